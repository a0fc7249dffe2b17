"""What a checkpoint's format says: under which names and shapes a linear's weight is held, and what it means."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch

from weft.errors import SettingsError
from worker_svc.models.config import ConfigReader
from worker_svc.models.loader import Shape
from worker_svc.quantization import StoredWeight

FLOAT_TYPES: Final = ("F32", "F16", "BF16")
NOTHING: Final = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a checkpoint holds it."""

    shapes: tuple[Shape, ...]  # any of these
    types: tuple[str, ...] = FLOAT_TYPES  # any of these, in the terms of safetensors
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """The kind of weight that a linear's is, for those who make one up."""

    kind: Literal["int8", "int4", "fp8"]
    group_size: int | None = None  # columns that share a scale; None for all


class Format(Protocol):
    """How the weights of linears are held."""

    @property
    def unread(self) -> re.Pattern[str]:
        """Tensors, by their whole names, that may be there and mean nothing here."""

    def form(self, name: str) -> Form | None:
        """What the weight of the linear `name` is; None for floats."""

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        """The tensors of a linear, by what follows its name and a dot.

        Args:
            shape: [out, in].
            held: what the checkpoint has of this linear, by the same names.

        Raises:
            SettingsError: the format cannot hold a weight of this shape.
        """

    def decode(self, name: str, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
        """The weight that tensors, which are as `stored` says, stand for.

        Raises:
            SettingsError: their content makes no sense.
        """


class FloatFormat:
    """One tensor of floats for each linear."""

    unread: Final = NOTHING

    def form(self, name: str) -> Form | None:
        return None

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        return {"weight": Stored((shape,))}

    def decode(self, name: str, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
        return tensors["weight"]


FLOATS: Final = FloatFormat()


def is_named(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern is a run of whole parts of a dotted name: "gate" of "mlp.gate", but not of "mlp.gate_proj"."""
    return any(f".{pattern.strip('.')}." in f".{name}." for pattern in patterns)


def compile_pattern(config: ConfigReader, key: str, text: str) -> re.Pattern[str]:
    """Raises SettingsError, which names the key: no regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise SettingsError(f"{config.source}: {key} has {text!r}, no regular expression: {error}") from error


def choice(config: ConfigReader, key: str, known: Collection[Any], default: Any = None) -> Any:
    """The value of a key, which is one of those known. Raises SettingsError, which names the key."""
    value = config.config.get(key)
    value = default if value is None else value
    if value not in known:
        raise SettingsError(f"{config.source}: {key} is {value!r}; known are {', '.join(map(str, known))}")
    return value


def names(config: ConfigReader, key: str) -> tuple[str, ...]:
    """A list of names; empty if there is none. Raises SettingsError, which names the key."""
    value = config.config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SettingsError(f"{config.source}: {key} is {value!r}, no list of names")
    return tuple(value)


def group_size(config: ConfigReader, key: str, default: int) -> int | None:
    """Columns that share a scale; None, written -1, for all. Raises SettingsError, which names the key."""
    size = config.integer(key, default, ge=-1)
    if size == 0:
        raise SettingsError(f"{config.source}: {key} is 0, neither a number of columns nor -1 for all")
    return size if size > 0 else None


def count_blocks(size: int, block: int) -> int:
    """Blocks that cover `size`, the last perhaps in part."""
    return -(-size // block)
