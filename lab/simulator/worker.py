"""A worker without a model: the shipping `plan_step` and `BlockPool`, and a formula instead of a forward pass.

Steps in which every sequence gets one token, but for one that computes as much of its prompt as the budget holds, are
alike but for the length of the contexts. As many as there are until anything else can happen are planned as one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final, cast

from lab.simulator.fit import step_s
from lab.simulator.record import Record
from scheduler_svc.cost_model import CostModel
from weft.columns import pack_u32, split_hashes
from weft.hashing import HASH_BYTES
from weft.messages import (
    FINISH_YIELD,
    BlockHash,
    Ended,
    KvEvents,
    TokenizedRequest,
    WorkerRole,
    WorkerStatus,
)
from worker_svc.batch import Limits, StepPlan, Work, commit_blocks, plan_step
from worker_svc.blocks import BlockPool
from worker_svc.engine_io import BlocksLoaded, LoadWanted
from worker_svc.kv_exchange import KvExchange
from worker_svc.rates import StepRates
from worker_svc.sequence import Request, Sequence, State, ending

SCHEDULER: Final = "s0"
# How much the last transfer weighs in the rate that a worker knows, as in a worker.
LOAD_WEIGHT: Final = 0.3
# Steps that are planned as one at most.
MAX_ALIKE: Final = 1 << 20


@dataclass(slots=True)
class Run:
    """Steps that are under way."""

    plan: StepPlan
    work: Work  # of its first step
    began: float
    num_steps: int
    first_s: float  # of the first step
    growth_s: float  # how much longer each step takes than the one before
    prefill: dict[Sequence, int]  # sequences that compute more than one token, and how many

    def end_of(self, count: int) -> float:
        """When `count` steps have been computed."""
        return self.began + count * self.first_s + self.growth_s * count * (count - 1) / 2

    def num_begun(self, now: float) -> int:
        """Steps that have begun at `now`, at least one."""
        least, most = 1, self.num_steps
        while least < most:
            middle = (least + most) // 2
            if self.end_of(middle) <= now:
                least = middle + 1
            else:
                most = middle
        return least


@dataclass(slots=True)
class Outcome:
    """What a run of steps gave."""

    first_at: float  # when its first step ended
    first_tokens: list[Record] = field(default_factory=list)  # of requests that got theirs in that step
    ended: list[Record] = field(default_factory=list)
    yielded: list[Sequence] = field(default_factory=list)


class SimWorker:
    """One replica. Its owner wakes it when a run has ended, and gives it requests at any time."""

    def __init__(
        self,
        name: str,
        cost: CostModel,
        limits: Limits,
        *,
        num_blocks: int,
        block_size: int,
        role: WorkerRole = "both",
        spread: tuple[float, ...] = (),
    ) -> None:
        """A worker that shares no KV; `share_kv` makes it one that does.

        Args:
            spread: factors of the formula's times, of which each step takes one by chance; none: all are exact.
        """
        self.name = name
        self.cost = cost
        self.pool = BlockPool(num_blocks, block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.run: Run | None = None
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_preemptions = 0
        self.role = role
        self.model = ""
        self._records: dict[Sequence, Record] = {}
        self._exchange = KvExchange(self.pool, kv_load="auto", kv_offload="never", block_bytes=1)
        self._reported: tuple[int, ...] = ()
        self._limits = limits
        self._spread = spread
        self._chance = random.Random(name)
        self._num_arrived = 0
        self._num_accepted = 0
        self._kv_sequence = 0
        self._rates = StepRates()

    @property
    def num_held(self) -> int:
        return len(self.waiting) + len(self.running) + self._exchange.num_loading

    # ---- requests ----

    def take(self, request: TokenizedRequest, record: Record, stop_after: int | None) -> LoadWanted | None:
        """Accept an assignment of one choice. Returns: the blocks that it waits for, if these are to be asked for."""
        self._num_arrived += 1
        self._num_accepted += 1
        (choice,) = request.choices
        num_tokens = request.num_prompt_tokens + len(choice.emitted) // 4
        own_end = request.num_prompt_tokens + record.num_output_tokens
        end_length, end_finish = ending(num_tokens, stop_after, own_end)
        sequence = Sequence(
            request=Request(request.request_id, request.gateway, request.epoch),
            arrival=self._num_arrived,
            slot=choice.slot,
            seed=0,
            sampling=request.sampling,
            # Only how many there are matters, and a byte each is enough for that.
            token_ids=cast("list[int]", bytearray(num_tokens)),
            num_prompt_tokens=request.num_prompt_tokens,
            end_length=end_length,
            stop_ids=frozenset(),
            root=None,
            hashes=cast("list[BlockHash]", split_hashes(request.block_hashes)),
            end_finish=end_finish,
        )
        self._records[sequence] = record
        self._extend_hashes(sequence)
        is_parked, wanted = self._exchange.park(sequence)
        if not is_parked:
            self.waiting.append(sequence)
        return wanted

    def share_kv(self, block_s: float) -> None:
        """From now on ask for blocks that others computed, if that takes less time than to compute them.

        Args:
            block_s: seconds that a block takes, as long as none has come.
        """
        self._exchange.is_available = True
        self._exchange.load_bytes_per_s = 1 / block_s

    def take_loaded(self, loaded: BlocksLoaded, seconds: float) -> None:
        """Put blocks that came into the pool, held by nobody, and let those that waited for them go on.

        Args:
            seconds: that they were under way.
        """
        if loaded.blocks:
            before = self._exchange.load_bytes_per_s
            self._exchange.load_bytes_per_s = before + LOAD_WEIGHT * (len(loaded.blocks) / seconds - before)
        placed = self._exchange.place(loaded, self.waiting)
        for sequence in placed.sequences:
            if sequence.request.request_id == loaded.request_id:
                self._records[sequence].num_fetched_tokens += len(placed.block_ids) * self.pool.block_size

    # ---- steps ----

    def begin(self, now: float) -> tuple[float | None, list[Record]]:
        """Begin the next run of steps. Returns when it ends (None: there is nothing to do), and what can never run."""
        plan = plan_step(self.waiting, self.running, self.pool, self._limits, now)
        self.num_preemptions += len(plan.preempted)
        rejected = [self._records.pop(sequence) for sequence, _ in plan.rejected]
        for sequence in plan.admitted:
            record = self._records[sequence]
            if record.first_token_at is None:
                record.num_cached_tokens = min(sequence.num_cached_tokens, sequence.num_prompt_tokens)
        if not plan.num_scheduled_tokens:
            return None, rejected
        prefill: dict[Sequence, int] = {}
        work = plan.work()
        if work.num_chunks:
            scheduled = plan.num_scheduled_tokens.items()
            prefill = {sequence: count for sequence, count in scheduled if sequence.num_uncomputed_tokens > 1}
        first_s = step_s(self.cost, work)
        growth_s = self.cost.context_s * work.num_sequences
        if prefill:
            growth_s += self.cost.attention_s * work.num_new**2
        if self._spread:
            first_s *= self._chance.choice(self._spread)
        # No two steps are alike where chance has a say.
        num_steps = 1 if self._spread else self._num_alike(plan, prefill)
        self.run = Run(plan, work, now, num_steps, first_s, growth_s, prefill)
        return self.run.end_of(num_steps), rejected

    def cut(self, now: float) -> float:
        """Let the run end with the step that is under way, since something has happened. Returns when that ends."""
        assert self.run is not None
        self.run.num_steps = self.run.num_begun(now)
        return self.run.end_of(self.run.num_steps)

    def finish(self, now: float) -> Outcome:
        """Take in what the run has computed."""
        run = self.run
        assert run is not None
        self.run = None
        count, first_at = run.num_steps, run.end_of(1)
        outcome = Outcome(first_at)
        gap_s, zeros = (now - first_at) / (count - 1) if count > 1 else 0.0, bytes(count)
        seconds = run.end_of(count) - run.began
        self.busy_s += seconds
        self.num_steps += count
        size = self.pool.block_size
        for sequence, num_new in run.plan.num_scheduled_tokens.items():
            record, before = self._records[sequence], sequence.num_computed_tokens
            # Of a decode the number is one.
            num_computed = sequence.num_computed_tokens = before + num_new * count
            if sequence in run.prefill:
                record.prefilled_s += self.cost.prefill_s(num_computed, before)
                self._hold(sequence)
            num_tokens = len(sequence.token_ids)
            if num_tokens // size > len(sequence.hashes):
                self._extend_hashes(sequence)
            if num_computed // size > sequence.num_committed_blocks:
                commit_blocks(sequence, self.pool)
            if num_computed < num_tokens:
                continue
            if record.first_token_at is None:
                outcome.first_tokens.append(record)
            elif record.last_token_at:
                record.gaps.append((first_at - record.last_token_at, 1))
            if count > 1:
                record.gaps.append((gap_s, count - 1))
            record.last_token_at = now
            sequence.token_ids.extend(zeros)
            if num_tokens + count >= sequence.end_length:
                self._end(sequence)
                if sequence.end_finish == FINISH_YIELD:
                    outcome.yielded.append(sequence)
                else:
                    outcome.ended.append(record)
        self._rate(run, seconds)
        return outcome

    def _hold(self, sequence: Sequence) -> None:
        """Give a sequence the blocks that it filled in steps after the first of a run."""
        missing = self.pool.blocks_for(sequence.num_computed_tokens) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self.pool.allocate(missing)

    def _extend_hashes(self, sequence: Sequence) -> None:
        """Name the full blocks beyond those that prompts share: nobody else has them."""
        num_full = sequence.num_known_tokens // self.pool.block_size
        for number in range(len(sequence.hashes), num_full):
            sequence.hashes.append(BlockHash(f"{sequence.request.request_id}/{number}".encode().ljust(HASH_BYTES)))

    def _num_alike(self, plan: StepPlan, prefill: dict[Sequence, int]) -> int:
        """Steps from this one on in which the same sequences compute as many tokens, and nobody else can start."""
        sequences = plan.num_scheduled_tokens
        if plan.preempted or len(sequences) < len(self.running) or len(prefill) > 1:
            return 1
        size, most = self.pool.block_size, MAX_ALIKE
        for sequence, count in prefill.items():
            if sum(sequences.values()) < self._limits.max_num_batched_tokens:
                return 1
            # The last piece of a prompt leaves something of the budget to others, and ends in a token.
            room = (len(sequence.block_table) + self.pool.num_free_blocks) * size - sequence.num_computed_tokens
            most = min((sequence.num_uncomputed_tokens - 1) // count, room // count)
        for sequence in sequences:
            if sequence in prefill:
                continue
            to_end = sequence.end_length - len(sequence.token_ids)
            to_next_block = len(sequence.block_table) * size - sequence.num_computed_tokens
            if to_end < most:
                most = to_end
            if to_next_block < most:
                most = to_next_block
        return max(1, most)

    def _end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.release())
        sequence.state = State.FINISHED
        del self._records[sequence]

    def _rate(self, run: Run, seconds: float) -> None:
        count = run.num_steps
        computed = Work(run.work.num_new * count, num_sequences=run.work.num_sequences * count)
        self._rates.add(computed, len(run.plan.num_scheduled_tokens) * count, seconds, count)
        self._exchange.prefill_tokens_per_s = self._rates.prefill.per_s

    # ---- news ----

    def has_news(self) -> bool:
        """Whether a scheduler would see another worker than at the last call. Mutates self."""
        news = self._num_accepted, len(self.running), len(self.waiting), self._exchange.num_loading
        if news == self._reported:
            return False
        self._reported = news
        return True

    def status(self) -> WorkerStatus:
        waiting = sum([len(sequence.token_ids) - sequence.num_computed_tokens for sequence in self.waiting])
        for sequence in self.running:
            lacking = len(sequence.token_ids) - sequence.num_computed_tokens
            if lacking > 1:
                waiting += lacking
        return WorkerStatus(
            worker=self.name,
            worker_epoch=1,
            model=self.model,
            state="ready",
            max_num_seqs=self._limits.max_num_seqs,
            num_running=len(self.running),
            num_waiting=len(self.waiting) + self._exchange.num_loading,
            num_waiting_tokens=waiting,
            num_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free_blocks,
            accepted={SCHEDULER: self._num_accepted},
            kv_sequence=self._kv_sequence,
            prefill_tokens_per_s=self._rates.prefill.per_s,
            decode_tokens_per_s=self._rates.decode.per_s,
            role=self.role,
            step_s=self._rates.step_s,
        )

    def kv_events(self) -> tuple[KvEvents, tuple[BlockHash, ...]] | None:
        """What changed since the last call, if anything did, and the blocks that came."""
        stored, removed = self.pool.take_changes()
        if not stored and not removed:
            return None
        self._kv_sequence += 1
        return KvEvents(self.name, 1, self._kv_sequence, b"".join(stored), b"".join(removed)), stored

    def ended(self, records: list[Record]) -> Ended:
        return Ended(
            self.name,
            self.model,
            [record.request_id for record in records],
            [record.tenant for record in records],
            pack_u32([record.num_prompt_tokens for record in records]),
            pack_u32([record.num_output_tokens for record in records]),
        )
