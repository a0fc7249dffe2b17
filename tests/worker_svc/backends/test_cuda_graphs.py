"""Which steps have a graph, and when one is captured."""

from __future__ import annotations

import pytest

from worker_svc.backends.cuda_graphs import MAX_BATCH, MIN_BLOCKS, MIN_USES, STEPS_BETWEEN, CapturePolicy, graph_shape
from worker_svc.backends.device_step import StepShape
from worker_svc.step_input import StepInput


def decodes(count: int, seq_len: int = 40) -> StepInput:
    tables = [list(range(-(-seq_len // 16)))] * count
    columns = [0] * count
    return StepInput(columns, columns, columns, [1] * count, [seq_len] * count, tables, list(range(count)))


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16), (17, 24), (MAX_BATCH, MAX_BATCH)]
)
def test_batch_sizes_are_rounded_up(count: int, size: int) -> None:
    assert graph_shape(decodes(count)) == StepShape(size, size, MIN_BLOCKS, 1)


def test_contexts_are_rounded_up_to_powers_of_two() -> None:
    found = [graph_shape(decodes(1, 16 * blocks)) for blocks in (MIN_BLOCKS, MIN_BLOCKS + 1, 200, 256)]
    assert [shape.num_blocks for shape in found if shape] == [MIN_BLOCKS, 2 * MIN_BLOCKS, 256, 256]


def test_only_plain_decodes_have_graphs() -> None:
    assert graph_shape(decodes(MAX_BATCH + 1)) is None
    prefill = StepInput([0, 0], [0, 1], [0, 1], [2], [2], [[0]], [1])
    assert graph_shape(prefill) is None
    silent = StepInput([0], [0], [0], [1], [1], [[0]], [])
    assert graph_shape(silent) is None


def test_shape_used_most_is_captured_first_and_one_at_a_time() -> None:
    policy = CapturePolicy()
    rare, often = StepShape(1, 1, 64, 1), StepShape(8, 8, 64, 1)
    captured: dict[int, StepShape] = {}
    for number in range(1, 3 * STEPS_BETWEEN):
        shape = policy.next()
        if shape is not None:
            captured[number] = shape
        used = rare if number % 3 == 0 else often
        if used not in captured.values():
            policy.note(used)
    assert list(captured.values()) == [often, rare]
    first, second = captured
    assert first >= STEPS_BETWEEN and second - first >= STEPS_BETWEEN


def test_shape_that_is_hardly_used_is_never_captured() -> None:
    policy = CapturePolicy()
    for _ in range(MIN_USES - 1):
        policy.note(StepShape(1, 1, 64, 1))
    assert not any(policy.next() for _ in range(5 * STEPS_BETWEEN))
