"""CUDA graphs of decode steps: one launch for all kernels of a forward pass.

A graph is of one shape: batch sizes and context lengths are rounded up, and what pads them computes nothing that anyone
reads. Graphs are captured when their shape has been used a few times, the one used most first and one at a time, so
that no first token waits for a capture; until then, and for all other steps, kernels are launched one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from worker_svc.backends.backend import Batch
from worker_svc.backends.device_step import DeviceStep, StepShape
from worker_svc.step_input import StepInput

# Uses of a shape before it is worth the time of a capture, and steps from one capture to the next.
MIN_USES: Final = 8
STEPS_BETWEEN: Final = 32
# Beyond this, the kernels themselves take longer than their launches.
MAX_BATCH: Final = 512
# A graph for fewer blocks would only be one graph more.
MIN_BLOCKS: Final = 64
_SMALL_BATCHES: Final = (1, 2, 4, 8)
_BATCH_STEP: Final = 8

Forward = Callable[[Batch], torch.Tensor]


def graph_shape(step: StepInput) -> StepShape | None:
    """The shape of the graph that can compute this step; None if none can."""
    count = len(step.query_lens)
    if len(step.token_ids) != count or len(step.logit_rows) != count or count > MAX_BATCH:
        return None
    size = next((size for size in _SMALL_BATCHES if size >= count), -(-count // _BATCH_STEP) * _BATCH_STEP)
    longest = StepShape.of(step).num_blocks
    return StepShape(size, size, max(MIN_BLOCKS, 1 << (longest - 1).bit_length()), 1)


@dataclass(slots=True)
class CapturePolicy:
    """Which shape to capture next, and when. Knows nothing of a device."""

    uses: Counter[StepShape] = field(default_factory=Counter)  # of shapes without a graph
    num_steps: int = 0  # since the last capture

    def note(self, shape: StepShape) -> None:
        """Count a step that had no graph."""
        self.uses[shape] += 1

    def next(self) -> StepShape | None:
        """Called once a step: the shape to capture now, which then counts as captured."""
        self.num_steps += 1
        if not self.uses or self.num_steps < STEPS_BETWEEN:
            return None
        shape, count = self.uses.most_common(1)[0]
        if count < MIN_USES:
            return None
        del self.uses[shape]
        self.num_steps = 0
        return shape


@dataclass(frozen=True, slots=True)
class _Captured:
    step: DeviceStep  # what the graph reads
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # what it writes


class CudaGraphs:
    """The graphs of one model."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """`forward` launches the kernels of a pass, and never waits for the device."""
        self._forward = forward
        self._device = device
        self._policy = CapturePolicy()
        self._captured: dict[StepShape, _Captured] = {}
        self._pool: Any = None

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Compute the step by its graph. Returns: logits [B, V], which the next replay overwrites; None without one."""
        self._capture_next()
        shape = graph_shape(step)
        if shape is None:
            return None
        captured = self._captured.get(shape)
        if captured is None:
            self._policy.note(shape)
            return None
        captured.step.fill(step, last_tokens)
        captured.graph.replay()
        return captured.logits[: len(step.query_lens)]

    def _capture_next(self) -> None:
        shape = self._policy.next()
        if shape is None:
            return
        step = DeviceStep.allocate(shape, self._device)
        step.fill(StepInput([], [], [], [], [], [], []), None)
        batch = step.batch(None)
        # Kernels are compiled and loaded at their first launch, which a capture does not allow.
        self._forward(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(batch)
        self._pool = graph.pool()
        self._captured[shape] = _Captured(step, graph, logits)
