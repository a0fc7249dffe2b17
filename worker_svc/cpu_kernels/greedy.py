"""The likeliest token of each row, and whether all its logits are finite, in one pass and a search for the place.

Reference: `argmax`, whose answer is the first place of the largest, and `isfinite` of all.
"""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np
import torch

from worker_svc.cpu_kernels.launch import (
    address_of,
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

# Values among which the place of the largest is searched, one by one.
SEARCHED: Final = 1024
_ZERO = np.float32(0.0)
_LOWEST = np.float32(-np.inf)


@kernel
def _greedy(pointer):
    args = arguments(pointer)
    num_rows, size = args[0], args[1]
    token_ids, is_finite = integers(args[3], num_rows), integers(args[4], num_rows)
    for row in range(thread_number(), num_rows, num_threads()):
        logits = floats(args[2] + 4 * row * args[5], size)
        top, sum_of_zeros, place = _LOWEST, _ZERO, 0
        for start in range(0, size, SEARCHED):
            part = floats(args[2] + 4 * (row * args[5] + start), min(SEARCHED, size - start))
            highest = top
            for i in range(len(part)):
                highest = larger(part[i], highest)
                # NaN times zero is NaN, and so is infinity.
                sum_of_zeros += part[i] * _ZERO
            if highest > top:
                top, place = highest, start
        if sum_of_zeros == _ZERO:
            while logits[place] != top:
                place += 1
        else:
            place = 0
        token_ids[row] = place
        is_finite[row] = sum_of_zeros == _ZERO


def greedy(logits: torch.Tensor) -> tuple[list[int], list[int]]:
    """Choose.

    Args:
        logits: [R, V] float32, each row contiguous.

    Returns:
        The tokens, and the rows of which some logit is not finite; of these the token is 0.

    Raises:
        ValueError: another shape, type or layout.
    """
    num_rows, size = logits.shape
    check_rows("logits", logits, size)
    # No tensors: making them took half of the time after a step that had gone through all caches.
    token_ids, is_finite = array("q", bytes(8 * num_rows)), array("q", bytes(8 * num_rows))
    pointers = (logits.data_ptr(), address_of(token_ids), address_of(is_finite), logits.stride(0))
    launch(_greedy, threads_for(num_rows * size), num_rows, size, *pointers)
    return token_ids.tolist(), [row for row, is_right in enumerate(is_finite) if not is_right]
