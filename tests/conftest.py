"""What holds for every test."""

from __future__ import annotations

import os

# Before anything imports torch. Two test processes with two threads each on two cores wait for each other: `generate`
# of a tiny model took 20 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
