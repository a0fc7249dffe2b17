"""Segment files: append-only msgpack records of blocks, each with its checksum. Blocking; for one thread.

A record is the msgpack array [key, crc32 of data ‖ key, data]. Nothing is trusted when read back: a record whose
checksum is wrong is skipped, and where the framing itself is broken (a torn tail), the rest of the segment is.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack

from cache_svc.index import Location
from weft import limits
from weft.errors import SettingsError
from weft.hashing import HASH_BYTES

_CHUNK_BYTES: Final = 2**20
# Broken bytes may claim to be anything: no claim makes a reader set memory aside.
_BOUNDS: Final = {"max_array_len": 3, "max_map_len": 0, "max_ext_len": 0}
MAX_RECORD_OVERHEAD: Final = 32  # bytes of a record besides its data
MAX_SHARDS: Final = 1024  # cache instances that may share a folder


@dataclass(frozen=True, slots=True)
class Block:
    """A block as it came: bytes, and their crc32."""

    data: bytes
    checksum: int


@dataclass(frozen=True, slots=True)
class Scan:
    """What a segment file holds: `skipped` counts unreadable records, a broken tail as one."""

    number: int
    size: int
    records: dict[bytes, Location]
    skipped: int


def encode_record(key: bytes, block: Block) -> bytes:
    packed: bytes = msgpack.Packer().pack((key, zlib.crc32(key, block.checksum), block.data))
    return packed


def decode_record(raw: bytes, key: bytes) -> Block | None:
    """The block of `key`, or None if these bytes are not its record, whole and right."""
    try:
        found = _read_record(msgpack.unpackb(raw, use_list=False, **_BOUNDS))
    except (msgpack.UnpackException, ValueError):
        return None
    return found[1] if found is not None and found[0] == key else None


def scan(path: Path, number: int) -> Scan:
    """Read a segment from its beginning, as far as it is whole, in bounded memory."""
    unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=limits.MAX_MESSAGE_BYTES + 4 * _CHUNK_BYTES, **_BOUNDS)
    records: dict[bytes, Location] = {}
    offset = skipped = 0
    with path.open("rb") as file:
        try:
            while chunk := file.read(_CHUNK_BYTES):
                unpacker.feed(chunk)
                for record in unpacker:
                    end = unpacker.tell()
                    found = _read_record(record)
                    if found is None:
                        skipped += 1
                    else:
                        records[found[0]] = Location(number, offset, end - offset)
                    offset = end
        except (msgpack.UnpackException, ValueError):
            # Where the next record begins cannot be known any more.
            pass
    size = path.stat().st_size
    return Scan(number, size, records, skipped + (offset < size))


class SegmentFolder:
    """One instance's folder of segment files, locked for the life of its process."""

    def __init__(self, path: Path) -> None:
        """Claim the first folder below `path` that no living process has.

        So instances that share a path stay apart, and one that starts anew finds the blocks of one that died.

        Raises:
            SettingsError: `path` cannot be used.
        """
        self._write_fd: tuple[int, int] | None = None  # (segment, descriptor)
        try:
            self._path, self._lock_fd = _claim(path)
        except OSError as error:
            raise SettingsError(f"disk_path {path} cannot be used: {error}") from error

    def scan_all(self) -> list[Scan]:
        """Every segment, in the order in which they were begun."""
        files = {int(file.stem): file for file in self._path.glob("*.segment") if file.stem.isdecimal()}
        return [scan(files[number], number) for number in sorted(files)]

    def write(self, location: Location, record: bytes) -> None:
        """Write a record at its place. Raises OSError, after which the segment must not be appended to."""
        if self._write_fd is None or self._write_fd[0] != location.segment:
            self._close_write()
            descriptor = os.open(self._file(location.segment), os.O_WRONLY | os.O_CREAT, 0o600)
            self._write_fd = (location.segment, descriptor)
        view = memoryview(record)
        while view:
            view = view[os.pwrite(self._write_fd[1], view, location.offset + len(record) - len(view)) :]

    def read(self, key: bytes, location: Location) -> Block | None:
        """The block of `key`, or None if its record cannot be read or is not right any more."""
        try:
            descriptor = os.open(self._file(location.segment), os.O_RDONLY)
        except OSError:
            return None
        try:
            return decode_record(os.pread(descriptor, location.length, location.offset), key)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def delete(self, segment: int) -> None:
        self._file(segment).unlink(missing_ok=True)

    def close(self) -> None:
        self._close_write()
        os.close(self._lock_fd)

    def _file(self, segment: int) -> Path:
        return self._path / f"{segment:08d}.segment"

    def _close_write(self) -> None:
        if self._write_fd is not None:
            os.close(self._write_fd[1])
            self._write_fd = None


def _read_record(record: object) -> tuple[bytes, Block] | None:
    """Key and block of what was unpacked, if it is a record and nothing in it has changed."""
    match record:
        case (bytes() as key, int() as stored, bytes() as data):
            checksum = zlib.crc32(data)
            if len(key) == HASH_BYTES and zlib.crc32(key, checksum) == stored:
                return key, Block(data, checksum)
    return None


def _claim(path: Path) -> tuple[Path, int]:
    for number in range(MAX_SHARDS):
        folder = path / f"shard-{number}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return folder, descriptor
    raise SettingsError(f"disk_path {path} has {MAX_SHARDS} instances already")
