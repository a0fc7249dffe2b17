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
from worker_svc.formats.format import FLOAT_TYPES, FLOATS, Format, Stored
from worker_svc.models.loader import Asked, Shape
from worker_svc.quantization import Reordered, StoredWeight

MAX_INDEX_BYTES: Final = 64 * 2**20
# How many tensors an error names before it only counts them.
MAX_NAMED: Final = 4
# Buffers that old versions of transformers saved along; they follow from the config.
_HARMLESS: Final = re.compile(r"(.*\.)?rotary_emb\.inv_freq|.*\.attn\.masked_bias")
_CPU: Final = torch.device("cpu")


class Checkpoint:
    """The open files of a folder: a `Source`. A context manager."""

    def __init__(
        self,
        folder: Path,
        format: Format = FLOATS,
        device: torch.device = _CPU,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Open all files and read their headers.

        Args:
            format: of the linears' weights.
            device: where these are unpacked.
            on_progress: called with the share of the tensors read so far, after each.

        Raises:
            SettingsError: no weights, or a file that is missing, broken or contradicts the index.
        """
        self.name = folder.name
        self._on_progress = on_progress
        self._num_read = 0
        self._stack = ExitStack()
        self._format = format
        self._device = device
        self._files: dict[str, Any] = {}  # by the tensor's name
        self._suffixes: dict[str, set[str]] = {}  # of the tensors of each linear or layer
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
        expected = self._expected(asked)
        found = {name for name in self._files if name in expected or not self._is_harmless(name, asked)}
        missing = [name for name, stored in expected.items() if name not in found and not stored.is_optional]
        wrong = [what for name in sorted(found & expected.keys()) if (what := self._complaint(name, expected[name]))]
        complaints = [
            *_listed("weights are missing", sorted(missing)),
            *_listed("weights are unknown", sorted(found - expected.keys())),
            *_listed("weights are wrong", wrong),
        ]
        if complaints:
            raise SettingsError(f"{self.name}: {'; '.join(complaints)}")

    def weight(self, name: str, shape: Shape) -> StoredWeight:
        """Read and unpack the weight of a linear.

        Raises:
            SettingsError: a tensor cannot be read, or makes no sense.
        """
        format = self._format_of(name)
        held = self._held(name)
        # Floats stay in the mapped file, of which a rank then reads its own part only.
        device = _CPU if format is FLOATS else self._device
        tensors = {
            suffix: self.tensor(f"{name}.{suffix}", shape).to(device)
            for suffix in format.stored(name, shape, held)
            if suffix in held
        }
        weight = format.decode(name, shape, tensors)
        plain = weight.weight if isinstance(weight, Reordered) else weight
        if not isinstance(plain, torch.Tensor) and not plain.scales.isfinite().all():
            raise SettingsError(f"{self.name}: {name} has scales that are no finite numbers")
        return weight

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
        self._on_progress(min(1.0, self._num_read / len(self._files)))
        return tensor

    def _expected(self, asked: Asked) -> dict[str, Stored]:
        """All tensors that are read, by name."""
        expected = {name: Stored((shape,)) for name, shape in asked.tensors.items()}
        for name, shape in asked.linears.items():
            stored = self._format_of(name).stored(name, shape, self._held(name))
            expected |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        return expected

    def _format_of(self, name: str) -> Format:
        """Some linears of a quantized checkpoint are left in floats, and not all formats say which."""
        weight = f"{name}.weight"
        is_float = weight in self._files and self._files[weight].get_slice(weight).get_dtype() in FLOAT_TYPES
        return FLOATS if is_float and self._held(name) <= {"weight", "bias"} else self._format

    def _held(self, name: str) -> set[str]:
        return self._suffixes.get(name, set())

    def _complaint(self, name: str, stored: Stored) -> str | None:
        """What is wrong with a tensor's shape or type."""
        header = self._files[name].get_slice(name)
        shape, kind = tuple(header.get_shape()), header.get_dtype()
        if shape not in stored.shapes:
            return f"{name} is {list(shape)} instead of {list(stored.shapes[-1])}"
        if kind not in stored.types:
            return f"{name} is of type {kind}, which is none of {', '.join(stored.types)}"
        return None

    def _is_harmless(self, name: str, asked: Asked) -> bool:
        """Whether a tensor that is not asked for makes no difference."""
        if name in asked.unread or _HARMLESS.fullmatch(name) or self._format.unread.fullmatch(name):
            return True
        # Some quantizers gave every linear a bias, of zeros where the model has none.
        linear, _, suffix = name.rpartition(".")
        return suffix == "bias" and linear in asked.linears and not self._files[name].get_tensor(name).any()

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
        for name in held:
            linear, _, suffix = name.rpartition(".")
            self._suffixes.setdefault(linear, set()).add(suffix)


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


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return [f"{what}: {', '.join(items[:MAX_NAMED])}{more}"]
