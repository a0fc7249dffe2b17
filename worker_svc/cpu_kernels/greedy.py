"""The likeliest token of each row, and whether all its logits are finite, in one pass and a search for the place.

Reference: `argmax`, whose answer is the first place of the largest, and `isfinite` of all.
"""

from __future__ import annotations

import numpy as np
import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    check_rows,
    floats,
    integers,
    kernel,
    larger,
    launch,
    num_threads,
    thread_number,
    threads_for,
)

_ZERO = np.float32(0.0)
_LOWEST = np.float32(-np.inf)


@kernel
def _greedy(pointer):
    args = arguments(pointer)
    num_rows, size = args[0], args[1]
    token_ids, is_finite = integers(args[3], num_rows), integers(args[4], num_rows)
    for row in range(thread_number(), num_rows, num_threads()):
        logits = floats(args[2] + 4 * row * args[5], size)
        top, sum_of_zeros = _LOWEST, _ZERO
        for i in range(size):
            top = larger(logits[i], top)
            # NaN times zero is NaN, and so is infinity.
            sum_of_zeros += logits[i] * _ZERO
        place = 0
        if sum_of_zeros == _ZERO:
            while logits[place] != top:
                place += 1
        token_ids[row] = place
        is_finite[row] = sum_of_zeros == _ZERO


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose.

    Args:
        logits: [R, V] float32, each row contiguous.

    Returns:
        The tokens, [R] int64, and of which rows some logit is not finite, [R] bool; of these the token is 0.

    Raises:
        ValueError: another shape, type or layout.
    """
    num_rows, size = logits.shape
    check_rows("logits", logits, size)
    token_ids, is_finite = torch.empty(2, num_rows, dtype=torch.int64).unbind(0)
    pointers = (logits.data_ptr(), token_ids.data_ptr(), is_finite.data_ptr(), logits.stride(0))
    launch(_greedy, threads_for(logits.numel()), num_rows, size, *pointers)
    return token_ids, is_finite == 0
