"""Typed access to a config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from weft.errors import SettingsError

# Far beyond any model's, and small enough that products of a few sizes stay within 64 bits.
MAX_SIZE: Final = 2**24
MAX_NUMBER: Final = 1e12


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to a config.json; every error names the file and the key."""

    config: Mapping[str, Any]
    source: str
    max_model_len: int | None = None  # tokens of the longest sequence that will be served; None for the model's own

    def with_defaults(self, **defaults: Any) -> ConfigReader:
        """The same with values for keys that are absent; a key that is null stays so."""
        return replace(self, config=defaults | dict(self.config))

    def integer(self, key: str, default: int | None = None, *, ge: int = 1, le: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not ge <= value <= le:
            raise self.error(f"{key} is {value!r}, not a whole number from {ge} to {le}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_positive(value):
            raise self.error(f"{key} is {value!r}, not a positive number up to {MAX_NUMBER:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """None if the key is absent or null."""
        return None if self.config.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.config.get(key)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_positive, values)):
            raise self.error(f"{key} is not a list of {count} positive numbers")
        return tuple(map(float, values))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, neither true nor false")
        return value

    def choice(self, key: str, known: Iterable[str], default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.error(f"{key} {value!r} is not known; known: {', '.join(known)}")
        return value

    def section(self, key: str) -> ConfigReader:
        """The object under `key`; an empty one if there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(f"{key} is {value!r}, no object")
        return replace(self, config=value, source=f"{self.source}: {key}")

    def error(self, problem: str) -> SettingsError:
        return SettingsError(f"{self.source}: {problem}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER
