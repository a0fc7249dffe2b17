"""Triton kernels, each beside its reference in torch: one file per family."""

import os

# Triton 3.9 warns in every process where this is not said. Fused multiply-add is what the kernels' tolerances allow.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
