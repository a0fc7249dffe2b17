"""What clients wait for in a run, to lay a real one beside its simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lab.simulator.record import Record

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each request of a run, in the order in which they came."""

    ttfts_s: Array
    decodes_s: Array  # from the first token to the last
    gaps_s: Array  # one for each request, which stands for all of its gaps

    @classmethod
    def of(cls, records: Iterable[Record], gap_s: Callable[[Record], float]) -> Times:
        """`gap_s`: what stands for the gaps of a request."""
        found = list(records)
        return cls(
            np.array([record.ttft_s for record in found]),
            np.array([record.e2e_s - record.ttft_s for record in found]),
            np.array([gap_s(record) for record in found]),
        )
