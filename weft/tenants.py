"""Tenants: what each may have. One file, read by gateways (quota, class, priority) and schedulers (weight) alike.

A line is a tenant's name and words `key=value`; the line of `*` is for everybody who has none, and for the anonymous:

    acme  weight=2 tokens_per_minute=60000 burst=10000 class=priority
    *     class=flex earliest_priority=10

An SLO class is what OpenAI calls a service tier; "default" is "" on the bus. Of priorities the lowest goes first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from weft import limits
from weft.errors import SettingsError

# What a tenant may be called, as a regular expression.
NAME: Final = r"[A-Za-z0-9_.-]{1,64}"
EVERYBODY: Final = "*"
# Names of SLO classes as users write them → on the bus, and the priority of a request that states none.
SLO_CLASSES: Final = {"default": "", "priority": "priority", "flex": "flex"}
USUAL_PRIORITY: Final = {"": 0, "priority": -10, "flex": 10}


@dataclass(frozen=True, slots=True)
class Tenant:
    """One line."""

    weight: float = 1.0  # of its share where the order is `fair`
    tokens_per_minute: int | None = None  # prompts and answers, in each gateway; None = no bound
    burst: int | None = None  # tokens at once after a pause; None = a minute's
    slo_class: str = ""  # of requests that do not ask for one
    earliest_priority: int = 0  # the lowest number that its requests may have

    def may_use(self, slo_class: str) -> bool:
        """Its own class, and those that are usually served no earlier than it may be."""
        return slo_class == self.slo_class or USUAL_PRIORITY[slo_class] >= self.earliest_priority


# Where no file says otherwise, everybody may have everything.
UNBOUNDED: Final = Tenant(earliest_priority=-limits.MAX_PRIORITY)


@dataclass(frozen=True, slots=True)
class Tenants:
    """All lines of a file."""

    by_name: Mapping[str, Tenant] = field(default_factory=dict)
    everybody: Tenant = UNBOUNDED

    @classmethod
    def read(cls, path: str) -> Tenants:
        """Read a tenants file; without a path nobody is bounded.

        Raises:
            SettingsError: names the file, the line, and what is wrong with it.
        """
        if not path:
            return cls()
        by_name: dict[str, Tenant] = {}
        for number, line in read_lines("tenants_file", path):
            name, *words = line.split()
            try:
                if name in by_name:
                    raise ValueError(f"{name!r} has a line already")
                by_name[_name(name)] = _tenant(words)
            except ValueError as error:
                raise SettingsError(f"tenants_file: {path}, line {number}: {error}") from error
        everybody = by_name.pop(EVERYBODY, Tenant())
        return cls(by_name, everybody)

    def of(self, name: str) -> Tenant:
        return self.by_name.get(name, self.everybody)

    def weights(self) -> dict[str, float]:
        """By tenant, where the weight of everybody else is 1."""
        return {name: tenant.weight / self.everybody.weight for name, tenant in self.by_name.items()}


def read_lines(setting: str, path: str) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines, but for empty ones and those that begin with `#`.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _name(text: str) -> str:
    if text != EVERYBODY and not re.fullmatch(NAME, text):
        raise ValueError(f"{text!r} is no tenant's name: letters, digits, and any of `_.-`, or `*` for everybody else")
    return text


def _tenant(words: list[str]) -> Tenant:
    given: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in _KEYS:
            raise ValueError(f"no key {key!r}; there are {', '.join(_KEYS)}")
        attribute, parse = _KEYS[key]
        if attribute in given:
            raise ValueError(f"{key!r} is given twice")
        given[attribute] = parse(key, text)
    if "burst" in given and "tokens_per_minute" not in given:
        raise ValueError("'burst' needs 'tokens_per_minute'")
    # A class that the operator gave is served as usual, unless the line says otherwise.
    given.setdefault("earliest_priority", min(0, USUAL_PRIORITY[given.get("slo_class", "")]))
    return Tenant(**given)


def _weight(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{key}: {text!r} is no number above 0")
    return value


def _whole(least: int, most: int) -> Callable[[str, str], int]:
    def parse(key: str, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,15}", text) or not least <= int(text) <= most:
            raise ValueError(f"{key}: {text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


def _slo_class(key: str, text: str) -> str:
    if text not in SLO_CLASSES:
        raise ValueError(f"{key}: {text!r} is none of {', '.join(SLO_CLASSES)}")
    return SLO_CLASSES[text]


# Key in the file → attribute, and what reads its value.
_KEYS: Final[Mapping[str, tuple[str, Callable[[str, str], Any]]]] = {
    "weight": ("weight", _weight),
    "tokens_per_minute": ("tokens_per_minute", _whole(1, 10**12)),
    "burst": ("burst", _whole(1, 10**12)),
    "class": ("slo_class", _slo_class),
    "earliest_priority": ("earliest_priority", _whole(-limits.MAX_PRIORITY, limits.MAX_PRIORITY)),
}
