"""Objectives of SLO classes as a setting: `ttft=2,tbt=0.2; priority:ttft=0.5,tbt=0.1`. Pure.

Classes are set apart by semicolons; the one without a name is the default, which holds for every class that is not
named. What a class does not name, it does not promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from scheduler_svc.policy.admit import Objectives
from weft.errors import SettingsError
from weft.tenants import SLO_CLASSES

_NAMES: Final = {"ttft": "ttft_s", "tbt": "tbt_s"}


def parse_objectives(text: str) -> dict[str, Objectives]:
    """Objectives by SLO class.

    Raises:
        SettingsError: says which part cannot be read, and why.
    """
    found: dict[str, Objectives] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, colon, promises = part.rpartition(":")
        name = name.strip() if colon else "default"
        if name not in SLO_CLASSES:
            raise _bad(part, f"there is no class {name!r}; there are {', '.join(SLO_CLASSES)}")
        if SLO_CLASSES[name] in found:
            raise _bad(part, f"the class {name!r} is there already")
        found[SLO_CLASSES[name]] = _objectives(part, promises)
    return found


def strictest_ttft_s(objectives: Mapping[str, Objectives]) -> float:
    """The least that any class is promised, in seconds; infinity if none is promised a first token."""
    return min((promised.ttft_s for promised in objectives.values()), default=math.inf)


def _objectives(part: str, promises: str) -> Objectives:
    given: dict[str, float] = {}
    for promise in promises.split(","):
        name, _, seconds = (word.strip() for word in promise.partition("="))
        if name not in _NAMES:
            raise _bad(part, f"{name!r} is none of {', '.join(_NAMES)}, as in ttft=2,tbt=0.2")
        if _NAMES[name] in given:
            raise _bad(part, f"{name!r} is there twice")
        given[_NAMES[name]] = _seconds(part, seconds)
    return Objectives(**given)


def _seconds(part: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise _bad(part, f"{text!r} is no number of seconds above 0")
    return seconds


def _bad(part: str, why: str) -> SettingsError:
    return SettingsError(f"slo: in {part!r}, {why}")
