"""Presets: the settings that make Weft decide as another system does. Pure.

A preset gives settings of the scheduler and of workers other defaults; what is set by a flag or a variable beside it
wins. What each reproduces of its original, and what it does not: `lab/PRESETS.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from weft.messages import WorkerRole

_NO_SETTINGS: Final = ("source", "roles")


@dataclass(frozen=True, slots=True)
class Preset:
    """One value of each setting that presets set."""

    source: str
    # The scheduler's.
    admit: str
    order: str
    route: str
    predict: str
    slo: str = ""
    # Those of workers.
    batching: str = "chunked"
    reserve: str = "paged"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    prefix_cache: bool = True
    kv_offload: str = "auto"
    kv_load: str = "auto"
    # What worker after worker is for, over and over. Only `weft up` and simulations know how many there are.
    roles: tuple[WorkerRole, ...] = ("both",)

    @property
    def policies(self) -> dict[str, str]:
        """Names of the scheduler's policies, by family."""
        return {family: getattr(self, family) for family in ("admit", "order", "route", "predict")}

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, by the names of the settings."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NO_SETTINGS}

    @property
    def uses_pool(self) -> bool:
        """Whether workers keep KV beyond their own memory, where others find it."""
        return self.kv_offload != "never" and self.kv_load != "never"

    def roles_of(self, num_workers: int) -> tuple[WorkerRole, ...]:
        """What each of so many workers is for: all for both, where they are too few to prefill and to decode apart."""
        roles = tuple(self.roles[number % len(self.roles)] for number in range(num_workers))
        whole: tuple[WorkerRole, ...] = ("both",)
        return roles if set(roles) == set(self.roles) else whole * num_workers


WEFT: Final = Preset(
    source="this project",
    # Without objectives (`--slo`) it is `bounded`.
    admit="predicted_reject",
    order="fcfs",
    route="least_prefill",
    predict="bucket",
    max_num_batched_tokens=256,
    max_num_seqs=64,
)
PRESETS: Final[Mapping[str, Preset]] = {
    "vllm": Preset(
        source="vLLM 0.32's defaults of an API server; its own balancer of data-parallel engines",
        admit="open",
        order="fcfs",
        route="least_loaded",
        predict="none",
        kv_offload="never",
        kv_load="never",
    ),
    "sglang": Preset(
        source="SGLang (NeurIPS '24), its server's defaults, and the cache-aware policy of its router",
        admit="open",
        order="prefix_first",
        route="prefix_aware",
        predict="none",
        batching="prefill_first",
        max_num_batched_tokens=8192,
        max_num_seqs=2048,
        kv_offload="never",
        kv_load="never",
    ),
    "mooncake": Preset(
        source="Mooncake (FAST '25), algorithm 1; arXiv 2407.00079, section 7, for rejection",
        admit="predicted_reject",
        order="fcfs",
        route="min_ttft",
        predict="mean",
        slo="ttft=30,tbt=0.3",
        kv_offload="always",
        roles=("prefill", "decode"),
    ),
    "deepflow": Preset(
        source="DeepServe, the paper of DeepFlow (ATC '25), algorithm 1",
        admit="open",
        order="fcfs",
        route="pd_heatmap",
        predict="bucket",
        kv_offload="always",
        roles=("both", "both", "prefill", "decode"),
    ),
    "weft": WEFT,
}
