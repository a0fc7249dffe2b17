"""Block sizes of the kernels: what a kernel's file says by default, or what was measured on this kind of device.

`python -m lab.gpu --tune` measures the candidates and writes `tuned/<device>.json`; a device without such a file, and
the interpreter, use the defaults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

TUNED: Final = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True)
class Config:
    """One way to launch a kernel. `blocks`: its block sizes by the names of its constexpr arguments."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def choose(kernel: str, key: str, default: Config, device: torch.device) -> Config:
    """The config measured for this kernel, key and device, else the default.

    Args:
        key: what the best choice depends on, coarsely: "M<=16 bfloat16".
    """
    return _table(_device_name(device)).get(f"{kernel} | {key}", default)


def path_of(device: torch.device) -> Path:
    """Where this device's measured configs are kept."""
    return TUNED / f"{_device_name(device)}.json"


def save(device: torch.device, table: dict[str, Config]) -> Path:
    """Write the measured configs, by "kernel | key"."""
    path = path_of(device)
    path.parent.mkdir(exist_ok=True)
    value = {name: asdict(config) for name, config in sorted(table.items())}
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    _table.cache_clear()
    return path


@cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


@cache
def _table(device_name: str) -> dict[str, Config]:
    path = TUNED / f"{device_name}.json"
    if not path.exists():
        return {}
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {name: Config(**config) for name, config in value.items()}
