"""How fast workers are, by name: constants of the cost formula, and how many tokens of KV fit.

What is not here is read from a JSON file of the same fields, as `weft calibrate` writes of a live worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from scheduler_svc.cost_model import CostModel
from scheduler_svc.hardware import Hardware, read_hardware
from weft.errors import SettingsError


def _flops(
    *, tera_flops: float, bytes_per_s: float, weights: float, num_layers: int, hidden_size: int, kv_bytes: int
) -> CostModel:
    """The formula of Mooncake (FAST '25), section 3: l (a n^2 d + b n d^2) operations, a = 4, and weights read once."""
    flops = tera_flops * 1e12
    return CostModel(
        overhead_s=2 * weights / bytes_per_s,
        token_s=2 * weights / flops,
        # n^2 operations are attention_s * n^2 / 2 of our formula.
        attention_s=2 * 4 * num_layers * hidden_size / flops,
        context_s=kv_bytes / bytes_per_s,
        sequence_s=2 * weights / flops,
    )


HARDWARE: Final[dict[str, Hardware]] = {
    # DistServe's own fit of vLLM, as `lab.simulator.fit.distserve_cost` converts it: prefill has an overhead of 22.1 ms
    # and decode one of 23.5 ms there, so the one overhead is within 3 % of either. For batches of at most 95.
    "a100": Hardware(
        "A100 80 GB, OPT-13B, one card (DistServe's fit)",
        CostModel(
            overhead_s=0.02276,
            token_s=0.14051e-3,
            attention_s=16.153e-9,
            context_s=0.5929e-6,
            sequence_s=0.06073e-3,
        ),
        # 90 % of the memory, less the weights' 26 GB.
        kv_tokens=56_000,
        kv_bytes_per_token=819_200,
    ),
    # Fitted to splitwise-sim's table of Llama 2 70B at 8-way tensor parallelism by `python -m lab.simulator.fit`.
    # Decode steps are within 7 % (median 2 %). Prefills are within 28 % (median 17 %): measured time is flat up to
    # 512 tokens and has a jump between 2,048 and 4,096, of which the formula knows nothing.
    "h100": Hardware(
        "8 H100 80 GB, Llama 2 70B (Splitwise's measurements)",
        CostModel(
            overhead_s=0.02915,
            token_s=0.02484e-3,
            attention_s=19.58e-9,
            context_s=0.3126e-6,
            sequence_s=0.1456e-3,
            chunk_s=0.01971,
        ),
        # 90 % of the memory, less the weights' 140 GB.
        kv_tokens=1_330_000,
        kv_bytes_per_token=327_680,
    ),
    # What Mooncake was measured on, by its own formula, at 45 % of the peak and 80 % of the bandwidth.
    "a800": Hardware(
        "8 A800, Llama 3 70B (Mooncake's formula)",
        _flops(
            tera_flops=0.45 * 8 * 312,
            bytes_per_s=0.8 * 8 * 2.0e12,
            weights=70e9,
            num_layers=80,
            hidden_size=8192,
            kv_bytes=327_680,
        ),
        kv_tokens=1_200_000,
        kv_bytes_per_token=327_680,
    ),
}


def find(name: str) -> Hardware:
    """That of `HARDWARE` with this name, or what the file of this name says.

    Raises:
        SettingsError: there is neither, or the file makes no sense.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.exists():
        known = f"{', '.join(HARDWARE)}, and files of `weft calibrate --out`"
        raise SettingsError(f"no hardware {name!r} and no such file; there are {known}")
    return read_hardware("hardware", path)
