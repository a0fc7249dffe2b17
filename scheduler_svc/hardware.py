"""What `weft calibrate` found out of a worker, as a file: constants of the cost formula, and how many tokens of KV fit.

The scheduler takes its constants instead of what workers measure lately, and the simulator plays such workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import msgspec

from scheduler_svc.cost_model import CostModel
from weft.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker of a kind."""

    what: str
    cost: CostModel
    kv_tokens: int  # that fit beside the weights
    kv_bytes_per_token: int
    spread: tuple[float, ...] = ()  # factors of the formula's times that were measured, each as likely as the others


def read_hardware(setting: str, path: Path) -> Hardware:
    """Read a file that `weft calibrate --out` wrote.

    Raises:
        SettingsError: names the setting, the file, and the field that makes no sense.
    """
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=Hardware)
        wrong = next(_faults(found, msgspec.json.decode(data)), None)
    except (OSError, msgspec.DecodeError) as error:
        wrong = str(error)
    if wrong is not None:
        raise SettingsError(f"{setting}: {path} makes no sense: {wrong}")
    return found


def read_cost(path: str) -> CostModel | None:
    """The constants of the setting `cost_file`; without a path, None.

    Raises:
        SettingsError: as `read_hardware`.
    """
    return read_hardware("cost_file", Path(path)).cost if path else None


def _faults(found: Hardware, given: dict[str, dict[str, object]]) -> Iterator[str]:
    # One that is misspelt would be 0.
    for name in given["cost"].keys() - {item.name for item in fields(CostModel)}:
        yield f"there is no constant `cost.{name}`"
    for name, value in asdict(found.cost).items():
        if not 0 <= value < math.inf:
            yield f"`cost.{name}` is no number of seconds"
    if not any(astuple(found.cost)):
        yield "`cost` says that no work takes any time"
    if found.spread and min(found.spread) <= 0:
        yield "a factor of `spread` is not above 0"
    for name in ("kv_tokens", "kv_bytes_per_token"):
        if getattr(found, name) < 1:
            yield f"`{name}` must be at least 1"
