"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Before anything imports torch. Two test processes with two threads each on two cores wait for each other: `generate`
# of a tiny model took 20 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Before anything imports triton: without a GPU the kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns if this is not said; fused multiply-add is what the kernels' tolerances allow for.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Timing never decides a test.
settings.register_profile("weft", deadline=None)
settings.load_profile("weft")
