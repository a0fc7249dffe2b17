"""Claims of the literature beside what Weft measures: `python -m lab.reproduce [--only NAME] [--trace FILE]`.

One line each: the name, who claims what, what was measured, under which conditions, and whether that reproduces it.
All but `lru` are simulated: the shipping scheduler, batching and block pool, with formulas for the forward pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from lab.report import Conditions, flags, say
from lab.reproduce import (
    cache_aware,
    chunked,
    completion,
    fairness,
    heatmap,
    lru,
    presets,
    rejection,
    reserve,
    routing,
)
from lab.reproduce.claim import Claim
from lab.reproduce.workload import Traces
from weft.errors import SettingsError

FAMILIES: Final[dict[str, Callable[[Traces], list[Claim]]]] = {
    "lru": lru.claims,
    "routing": routing.claims,
    "reserve": reserve.claims,
    "chunked": chunked.claims,
    "fairness": fairness.claims,
    "mlfq": completion.mlfq_claims,
    "srpt": completion.srpt_claims,
    "rejection": rejection.claims,
    "heatmap": heatmap.claims,
    "sglang": cache_aware.claims,
    "presets": presets.claims,
}
# Beside the repository.
TRACES: Final = Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the flags, measure, print; returns the exit status, 0 whatever the verdicts are."""
    options = _options(arguments)
    conditions = Conditions()
    traces = Traces(options.traces, options.trace)
    found: list[Claim] = []
    try:
        for name in options.only or FAMILIES:
            say(f"{name} …")
            claims = FAMILIES[name](traces)
            sys.stdout.writelines(claim.line() + "\n" for claim in claims)
            sys.stdout.flush()
            found += claims
    except SettingsError as error:
        say(f"lab.reproduce: {error}")
        return 2
    if options.json:
        rows = [claim.row() for claim in found]
        options.json.write_text(
            json.dumps({"conditions": asdict(conditions), "claims": rows}, indent=1, allow_nan=False) + "\n"
        )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = flags(FAMILIES, __doc__)
    parser.add_argument(
        "--traces", type=Path, default=TRACES, help=f"folder of the public traces, {TRACES} if not said"
    )
    parser.add_argument("--trace", type=Path, help="use this trace instead of each of them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
