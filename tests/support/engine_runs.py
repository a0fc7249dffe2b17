"""Drives an `Engine` until its requests have ended, and gathers what came of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.messages import ErrorInfo
from worker_svc.engine import Engine
from worker_svc.engine_io import Command, Started, StepOutput


@dataclass
class Outcome:
    """What one stream got."""

    token_ids: list[int] = field(default_factory=list)
    finish: int = 0
    error: ErrorInfo | None = None
    logprobs: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)
    first_index: int = 0


@dataclass
class Record:
    """Everything that an engine put out."""

    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict)  # by (request_id, slot)
    started: dict[str, Started] = field(default_factory=dict)
    outputs: list[StepOutput] = field(default_factory=list)

    def take(self, output: StepOutput) -> None:
        self.outputs.append(output)
        for started in output.started:
            assert started.request_id not in self.started or self.started[started.request_id].epoch < started.epoch
            self.started[started.request_id] = started
        for row in output.rows:
            key = row.request_id, row.slot
            outcome = self.outcomes.setdefault(key, Outcome(first_index=row.first_index))
            assert not outcome.finish, "a stream went on after its end"
            assert row.first_index == outcome.first_index + len(outcome.token_ids), "a token index is missing"
            outcome.token_ids += row.token_ids
            outcome.logprobs += row.logprobs
            outcome.finish, outcome.error = row.finish, row.error

    def tokens(self, request_id: str = "r0", slot: int = 0) -> list[int]:
        return self.outcomes[request_id, slot].token_ids

    @property
    def ended(self) -> list[tuple[str, int]]:
        return [pair for output in self.outputs for pair in output.ended]


def run(engine: Engine, commands: Iterable[Command] = (), *, record: Record | None = None, steps: int = 5000) -> Record:
    """Step until there is no work left, proving after each step that no block is lost."""
    record = Record() if record is None else record
    pending = list(commands)
    while pending or engine.has_work:
        step(engine, pending, record)
        pending = []
        steps -= 1
        assert steps, "the engine does not come to an end"
    return record


def step(engine: Engine, commands: Iterable[Command], record: Record) -> None:
    output = engine.step(commands)
    if output is not None:
        record.take(output)
    engine.pool.check(sequence.block_table for sequence in [*engine.running, *engine.waiting])
