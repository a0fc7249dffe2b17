"""The tensors of a Hugging Face folder: one safetensors file, or shards with an index. Nothing is unpickled.

What a checkpoint holds is compared with what the model expects before any tensor is read, so that a wrong folder is
refused at once, with one sentence that names the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open

from weft.errors import SettingsError
from worker_svc.models.loader import Asked, Shape

FLOAT_TYPES: Final = ("F32", "F16", "BF16")
MAX_INDEX_BYTES: Final = 64 * 2**20
# How many tensors an error names before it only counts them.
MAX_NAMED: Final = 4
# Buffers that old versions of transformers saved along; they follow from the config.
_HARMLESS: Final = re.compile(r"(.*\.)?rotary_emb\.inv_freq|.*\.attn\.masked_bias")


class Checkpoint:
    """The open files of a folder of float weights: a `Source`. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Open all files and read their headers.

        Raises:
            SettingsError: no weights, or a file that is missing, broken or contradicts the index.
        """
        self.name = folder.name
        # Called with the share of the tensors read so far, after each.
        self.on_progress: Callable[[float], None] = lambda share: None
        self._num_read = 0
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # by the tensor's name
        try:
            for file, names in _find_files(folder).items():
                self._open(file, names)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def check(self, asked: Asked) -> None:
        """Compare names, shapes and types with the model's.

        Raises:
            SettingsError: names what is missing, unknown, wrongly shaped or of a type that cannot be served.
        """
        expected = asked.by_tensor()
        found = {name for name in self._files if name not in asked.unread and not _HARMLESS.fullmatch(name)}
        wrong: list[str] = []
        for name in sorted(found & expected.keys()):
            header = self._files[name].get_slice(name)
            shape = tuple(header.get_shape())
            if shape != expected[name]:
                wrong.append(f"{name} is {list(shape)} instead of {list(expected[name])}")
            elif header.get_dtype() not in FLOAT_TYPES:
                wrong.append(f"{name} is of type {header.get_dtype()}, which is none of {', '.join(FLOAT_TYPES)}")
        complaints = [
            *_complaint("weights are missing", sorted(expected.keys() - found)),
            *_complaint("weights are unknown", sorted(found - expected.keys())),
            *_complaint("weights are wrong", wrong),
        ]
        if complaints:
            raise SettingsError(f"{self.name}: {'; '.join(complaints)}")

    def weight(self, name: str, shape: Shape) -> torch.Tensor:
        return self.tensor(f"{name}.weight", shape)

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        """Read one tensor, on the CPU and in the type it was saved in; may share memory with the mapped file.

        Raises:
            SettingsError: the tensor cannot be read.
        """
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{self.name}: weight {name} cannot be read: {error}") from error
        self._num_read += 1
        self.on_progress(min(1.0, self._num_read / len(self._files)))
        return tensor

    def _open(self, file: Path, names: frozenset[str] | None) -> None:
        try:
            opened = self._stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        except FileNotFoundError:
            raise SettingsError(f"{self.name}: {file.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{self.name}: {file.name} is no intact safetensors file: {error}") from error
        held = set(opened.keys())
        if names is not None and names - held:
            absent = ", ".join(sorted(names - held)[:MAX_NAMED])
            raise SettingsError(f"{self.name}: {file.name} lacks weights that the index says it has: {absent}")
        twice = sorted(held & self._files.keys())
        if twice:
            raise SettingsError(f"{self.name}: weight {twice[0]} is in more than one file")
        self._files.update(dict.fromkeys(held, opened))


def _find_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Files to open, each with the names that the index promises of it, if there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _read_index(index)
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingsError(f"{folder} has no weights: no *.safetensors file in it")
    return dict.fromkeys(files, None)


def _read_index(index: Path) -> dict[Path, frozenset[str] | None]:
    source = f"{index.parent.name}/{index.name}"
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise SettingsError(f"{source} is larger than {MAX_INDEX_BYTES} bytes")
        value = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{source} cannot be read: {error}") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SettingsError(f"{source} has no weight_map")
    by_file: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise SettingsError(f"{source}: {file!r} is no name of a file beside it")
        by_file.setdefault(index.parent / file, set()).add(name)
    return {file: frozenset(names) for file, names in by_file.items()}


def _complaint(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return [f"{what}: {', '.join(items[:MAX_NAMED])}{more}"]
