"""Ranks of a group as threads of this process: the sharing of a model without the seconds that processes take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from worker_svc.parallel.group import Group

T = TypeVar("T")
TIMEOUT_S = 20.0


class ThreadGroup(Group):
    """One thread's view; `board` and `barrier` are those of all."""

    def __init__(self, rank: int, size: int, board: list[torch.Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self._board = board
        self._barrier = barrier

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self._exchange(tensor)))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = self._exchange(tensor)
        return parts if self.rank == 0 else []

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._exchange(tensor)[0])

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.rank] = tensor.clone()
        self._barrier.wait(TIMEOUT_S)
        parts = list(self._board)
        self._barrier.wait(TIMEOUT_S)
        return parts


def run_ranks(size: int, body: Callable[[ThreadGroup], T]) -> list[T]:
    """What `body` returns on each rank of a new group; raises what it raises on the first that failed."""
    barrier = threading.Barrier(size)
    board = [torch.empty(0)] * size

    def run(rank: int) -> T:
        try:
            return body(ThreadGroup(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
