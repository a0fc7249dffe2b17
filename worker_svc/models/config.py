"""Typed access to a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import SettingsError


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to a config.json; every error names the file and the key."""

    config: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None, *, ge: int = 1, le: int = 2**31) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not ge <= value <= le:
            raise SettingsError(f"{self.source}: {key} is {value!r}, not a whole number from {ge} to {le}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise SettingsError(f"{self.source}: {key} is {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise SettingsError(f"{self.source}: {key} is {value!r}, neither true nor false")
        return value

    def section(self, key: str) -> ConfigReader:
        """The object under `key`; an empty one if there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise SettingsError(f"{self.source}: {key} is {value!r}, no object")
        return ConfigReader(value, f"{self.source}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value
