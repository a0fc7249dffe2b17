"""Segment files: whatever happens to their bytes, what is served is what was put."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_svc.index import Location
from cache_svc.segments import MAX_RECORD_OVERHEAD, Block, SegmentFolder, decode_record, encode_record, scan
from weft.errors import SettingsError


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block(number: int, size: int = 100) -> Block:
    data = bytes([number % 256]) * size
    return Block(data, zlib.crc32(data))


def write_segment(path: Path, count: int = 5) -> list[bytes]:
    records = [encode_record(key(i), block(i)) for i in range(count)]
    path.write_bytes(b"".join(records))
    return records


def test_any_msgpack_reader_can_read_a_segment(tmp_path: Path) -> None:
    write_segment(tmp_path / "0.segment", 2)
    with (tmp_path / "0.segment").open("rb") as file:
        expected = [[key(i), zlib.crc32(block(i).data + key(i)), block(i).data] for i in range(2)]
        assert list(msgpack.Unpacker(file)) == expected


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 2**20])
def test_a_record_has_no_more_overhead_than_said(size: int) -> None:
    record = encode_record(key(1), block(1, size))
    assert len(record) <= size + MAX_RECORD_OVERHEAD
    assert decode_record(record, key(1)) == block(1, size)
    assert decode_record(record, key(2)) is None


def test_a_scan_finds_every_record_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "0.segment"
    write_segment(path)
    found = scan(path, 7)
    assert found.skipped == 0 and list(found.records) == [key(i) for i in range(5)]
    data = path.read_bytes()
    for i, at in enumerate(found.records.values()):
        assert at.segment == 7
        assert decode_record(data[at.offset : at.offset + at.length], key(i)) == block(i)


def test_records_larger_than_a_read_are_found(tmp_path: Path) -> None:
    path = tmp_path / "0.segment"
    path.write_bytes(b"".join(encode_record(key(i), block(i, 3 * 2**20)) for i in range(3)))
    assert len(scan(path, 0).records) == 3


def test_a_torn_tail_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.segment"
    records = write_segment(path)
    path.write_bytes(b"".join(records)[: -len(records[-1]) // 2])
    found = scan(path, 0)
    assert (len(found.records), found.skipped) == (4, 1)


def test_a_record_with_a_flipped_bit_is_skipped_and_those_after_it_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "0.segment"
    records = write_segment(path)
    data = bytearray(b"".join(records))
    data[len(records[0]) + 60] ^= 1
    path.write_bytes(data)
    found = scan(path, 0)
    assert found.skipped == 1
    assert sorted(found.records) == [key(i) for i in (0, 2, 3, 4)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_damage_makes_a_wrong_block(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "0.segment"
    whole = bytearray(b"".join(write_segment(path)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    for found, at in scan(path, 0).records.items():
        assert found in map(key, range(5))
        read = decode_record(bytes(whole[at.offset : at.offset + at.length]), found)
        assert read == block(int.from_bytes(found, "big"))


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_random_bytes_are_never_more_than_skipped(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "0.segment"
    path.write_bytes(noise)
    found = scan(path, 0)
    assert found.records == {} and (found.skipped > 0) == bool(noise)


def test_two_instances_never_share_a_folder_and_a_free_one_is_taken_again(tmp_path: Path) -> None:
    first, second = SegmentFolder(tmp_path), SegmentFolder(tmp_path)
    record = encode_record(key(1), block(1))
    first.write(Location(0, 0, len(record)), record)
    assert second.scan_all() == []
    first.close()
    again = SegmentFolder(tmp_path)
    assert list(again.scan_all()[0].records) == [key(1)]
    second.close()
    again.close()


def test_a_path_that_is_no_folder_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="disk_path"):
        SegmentFolder(tmp_path / "file")


def test_a_read_of_what_is_gone_or_cut_gives_nothing(tmp_path: Path) -> None:
    folder = SegmentFolder(tmp_path)
    record = encode_record(key(1), block(1))
    at = Location(0, 0, len(record))
    assert folder.read(key(1), at) is None
    folder.write(at, record)
    assert folder.read(key(1), at) == block(1)
    folder.delete(0)
    assert folder.read(key(1), at) is None
    folder.close()
