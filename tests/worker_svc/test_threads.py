"""How many threads a step gets."""

from __future__ import annotations

from worker_svc.step_input import StepInput
from worker_svc.threads import Threads, resolve_threads


def make_step(num_sequences: int, num_queries: int, seq_len: int) -> StepInput:
    num_tokens = num_sequences * num_queries
    queries, lens = [num_queries] * num_sequences, [seq_len] * num_sequences
    return StepInput([0] * num_tokens, [0] * num_tokens, [0] * num_tokens, queries, lens, [[0]] * num_sequences, [])


def test_decodes_of_a_small_model_take_one_thread_and_its_prefills_more() -> None:
    threads = Threads(max_threads=8, num_weights=6_000_000, num_cached=1536)
    assert threads.choose(make_step(1, 1, 200)) == 1
    assert threads.choose(make_step(16, 1, 150)) == 1
    assert threads.choose(make_step(1, 256, 256)) > 2


def test_every_step_of_a_large_model_takes_all_threads() -> None:
    threads = Threads(max_threads=4, num_weights=100_000_000, num_cached=6144)
    assert threads.choose(make_step(1, 1, 1)) == 4


def test_long_contexts_are_work_too() -> None:
    threads = Threads(max_threads=8, num_weights=6_000_000, num_cached=1536)
    assert threads.choose(make_step(16, 1, 3000)) > 1


def test_threads_leave_the_mesh_of_a_large_machine_its_share() -> None:
    assert [resolve_threads(0, cores) for cores in (1, 2, 4, 8, 9, 64)] == [1, 2, 4, 7, 8, 56]
    assert resolve_threads(5, 2) == 5
