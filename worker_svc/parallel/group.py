"""The processes that compute one model together, and what they tell each other in the middle of a step.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): each rank has some heads and some of an MLP's inner channels, and
twice a layer the ranks add up what they got. Only tensors go this way; commands and KV blocks have pipes (`pipe.py`).
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

# A rank that died closes its connections, which ends the others at once; this is for one that hangs.
TIMEOUT: Final = timedelta(seconds=120)
# All ranks are on one machine, and what listens for them is to be reached from there only.
LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"


class Group:
    """One rank's view of its group. A group of one needs no connection, and none of the operations."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def connect(self, device: torch.device, path: str) -> None:
        """Meet the other ranks; every rank calls this once, and a process is in one group at a time.

        Args:
            device: of the tensors to come.
            path: absolute, of a file that did not exist before; the same for all.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        is_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=Path(path).as_uri(),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=device if is_cuda else None,
        )

    def close(self) -> None:
        """Leave. The others must be past their last operation."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same to the bit on each; overwrites `tensor`."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, of one shape, in order; on ranks other than 0 none."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        dist.gather(tensor, parts or None)
        return parts

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor; that of the others is overwritten with it."""
        dist.broadcast(tensor, 0)
        return tensor


ALONE: Final = Group()
