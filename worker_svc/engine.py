"""The engine: takes requests in, computes step after step, and says what came of each.

It is single-threaded and does no I/O: `torch_engine.py` gives it a thread, a queue and a model folder. What a step
computes is decided in `batch.py`; blocks are `blocks.py`'s, the model is the runner's.

On a device that computes beside the host a step stays in flight while the next is planned and handed over: tokens are
fed back on the device, stand as `UNKNOWN_TOKEN` in their sequences, and are read one step late. Whoever turns out to
have ended then was computed for one token too many, which nobody sees. The device works in order, so blocks may change
hands at once.

What concerns one sequence (bad input, logits that are not finite, a prompt that cannot fit) ends that sequence with
an error. Any other exception is a fault of the engine or the machine and ends the process: the gateways then recover
all streams elsewhere, which no error here could do for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, Final

import torch

from weft.columns import split_hashes
from weft.errors import InvariantViolation, WeftError
from weft.hashing import chain_root
from weft.messages import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    BlockHash,
    ErrorInfo,
    TokenizedRequest,
)
from weft.settings import WorkerSettings
from worker_svc.batch import Limits, StepPlan, Work, commit_blocks, plan_step
from worker_svc.blocks import BlockPool
from worker_svc.checks import check_request
from worker_svc.engine_io import (
    Add,
    BlocksLoaded,
    BlocksOffloaded,
    Command,
    Drop,
    EngineLoad,
    StepOutput,
)
from worker_svc.flight import Flight, Landed
from worker_svc.kv_exchange import make_exchange
from worker_svc.outbox import Outbox
from worker_svc.rates import Rate, StepRates
from worker_svc.runner import ModelRunner
from worker_svc.sampler import Logprobs, Sampler
from worker_svc.sequence import Request, Sequence, State, make_sequences
from worker_svc.speculation.speculation import Emitted, Speculation, StepOutcome, draft_step
from worker_svc.step_input import make_step_input
from worker_svc.stopwatch import start as start_stopwatch

if TYPE_CHECKING:
    from worker_svc.device_sampler import DeviceSampler

log = logging.getLogger(__name__)

# How often an idle engine proves that its books balance.
CHECK_INTERVAL_S: Final = 10.0
# A prompt in many chunks is told of once in so many, since each time is a message.
CHUNKS_TOLD: Final = 8


class Engine:
    """The step and the books around it."""

    def __init__(
        self,
        runner: ModelRunner,
        settings: WorkerSettings,
        *,
        digest: bytes,
        eos_token_ids: Iterable[int],
        load: EngineLoad | None = None,
        overlaps: bool = False,
        sampler: Sampler | DeviceSampler | None = None,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing running.

        Args:
            digest: what `model_folder.digest` says; names the model in block hashes.
            load: numbers to keep up to date.
            overlaps: keep a step in flight while the next is planned.
            sampler: the runner's, if others ask it as well.
            speculation: drafts tokens.
            clock: monotonic seconds.
        """
        self.pool = BlockPool(runner.num_blocks)
        self.exchange = make_exchange(
            self.pool, settings, block_bytes=runner.block_bytes, is_cpu=runner.device.type == "cpu"
        )
        self.load = EngineLoad() if load is None else load
        self.load.num_blocks = self.load.num_free_blocks = runner.num_blocks
        self.load.cached_hashes = self.pool.hashes if settings.prefix_cache else list
        # What the bytes of a block mean, and how many they are.
        self.layout = runner.layout
        self.block_bytes = runner.block_bytes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        # Of the step whose tokens came last; None if the last call of `step` brought none.
        self.landed: Work | None = None
        self._limits = Limits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.batching,
            settings.reserve,
            runner.max_model_len,
        )
        self._prefix_cache = settings.prefix_cache
        self._runner = runner
        self._sampler = runner.make_sampler() if sampler is None else sampler
        self._digest = digest
        self._eos_token_ids = frozenset(eos_token_ids)
        self._overlaps = overlaps
        self._speculation = speculation
        self._flight: Flight | None = None
        self._landed_at = 0.0
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        self._out = Outbox()
        self._rates = StepRates()
        self._busy = Rate()
        self._checked_at = -CHECK_INTERVAL_S

    @property
    def has_work(self) -> bool:
        """Whether a step would do something without a new command."""
        return bool(self.running or self.waiting or self._flight or self.exchange.has_offloads)

    @torch.inference_mode()
    def step(self, commands: Iterable[Command] = ()) -> StepOutput | None:
        """Take in commands and compute one step. None: nothing happened that anyone need know."""
        began = self._clock()
        self.landed = None
        for command in commands:
            self.apply(command)
        if self._speculation is not None and self._speculation.waits:
            # A draft begins after the last token, which must be known.
            self._land()
        plan = plan_step(self.waiting, self.running, self.pool, self._limits, began)
        self._announce(plan)
        launched = self._launch(plan, self._draft(plan), began)
        if self._overlaps:
            self._land()
        self._flight = launched
        if not self._overlaps:
            self._land()
        self._count()
        return self._emit()

    def close(self) -> None:
        """Let go of the model; there are no more steps."""
        self._runner.close()

    # ---- commands ----

    def apply(self, command: Command) -> None:
        match command:
            case Add(request, stop_after):
                self._add(request, stop_after)
            case Drop():
                self._drop(command)
            case BlocksLoaded():
                placed = self.exchange.place(command, self.waiting)
                self._runner.write_blocks(placed.block_ids, placed.blocks)
            case BlocksOffloaded(num_blocks):
                self.exchange.offloaded(num_blocks)

    def _add(self, request: TokenizedRequest, stop_after: int | None) -> None:
        held = self._requests.get(request.request_id)
        if held is not None:
            if held.epoch >= request.epoch:
                return
            self._drop(Drop(held.request_id, held.epoch))
        try:
            check_request(
                request,
                model=request.model,
                vocab_size=self._runner.vocab_size,
                max_model_len=self._runner.max_model_len,
            )
        except WeftError as error:
            self._out.refused(request, ErrorInfo.of(error))
            return
        group = self._make_sequences(request, stop_after)
        self._requests[request.request_id] = group
        for sequence in list(group.live):
            self._enter(sequence)

    def _make_sequences(self, request: TokenizedRequest, stop_after: int | None) -> Request:
        if self._prefix_cache:
            root: BlockHash | None = chain_root(self._digest, request.cache_salt)
        elif len(request.choices) > 1:
            # A root that no other request has: the choices share blocks, and nobody else does.
            root = chain_root(self._digest, f"{request.request_id} {request.epoch}")
        else:
            root = None
        self._num_arrived += 1
        return make_sequences(
            request,
            arrival=self._num_arrived,
            max_model_len=self._runner.max_model_len,
            eos_token_ids=self._eos_token_ids,
            root=root,
            hashes=split_hashes(request.block_hashes) if self._prefix_cache else [],
            stop_after=stop_after,
        )

    def _enter(self, sequence: Sequence) -> None:
        if len(sequence.token_ids) >= sequence.end_length:
            self._start(sequence)
            self._finish(sequence, len(sequence.token_ids), FINISH_LENGTH)
            return
        if self._prefix_cache:
            is_parked, wanted = self.exchange.park(sequence)
            if wanted is not None:
                self._out.waits(wanted)
            if is_parked:
                return
        self.waiting.append(sequence)

    def _drop(self, drop: Drop) -> None:
        request = self._requests.get(drop.request_id)
        if request is None or request.epoch > drop.epoch:
            return
        for sequence in [s for s in request.live if not drop.slots or s.slot in drop.slots]:
            self._end(sequence)

    # ---- the step ----

    def _announce(self, plan: StepPlan) -> None:
        for sequence in plan.admitted:
            self._start(sequence)
            self._offer(sequence.hashes[: sequence.num_committed_blocks])
        for sequence in plan.preempted:
            self._forget(sequence)
            self._out.progressed(sequence, "preempted", sequence.num_known_tokens)
            sequence.num_chunks = 0
        for sequence, error in plan.rejected:
            self._fail(sequence, sequence.num_known_tokens, ErrorInfo.of(error))
        self.load.num_preemptions += len(plan.preempted)

    def _draft(self, plan: StepPlan) -> dict[Sequence, Ordered[int]] | None:
        """None: nobody drafts, or the step is left alone."""
        if self._speculation is None:
            return None
        return draft_step(
            self._speculation,
            plan,
            self.pool,
            num_running=len(self.running),
            max_num_batched_tokens=self._limits.max_num_batched_tokens,
        )

    def _launch(self, plan: StepPlan, drafted: dict[Sequence, Ordered[int]] | None, began: float) -> Flight | None:
        """Hand the step to the device, and count as computed what it will have computed."""
        drafts = drafted or {}
        for source, target in plan.copies:
            self._runner.copy_block(source, target)
        if not plan.num_scheduled_tokens:
            return None
        work = plan.work()
        step, sampled = make_step_input(plan, drafts)
        stopwatch = start_stopwatch(self._runner.device)
        logits = self._runner.forward(step, self._sampler.last_token_ids if step.pending else None)
        sampled_drafts = [drafts.get(sequence, ()) for sequence in sampled]
        sampling = self._sampler.sample(logits, sampled, sampled_drafts if drafts else None) if sampled else None
        stopwatch.stop()
        for sequence, count in plan.num_scheduled_tokens.items():
            sequence.num_computed_tokens += count
            self._commit_blocks(sequence)
            if count > 1 or sequence.num_chunks:
                self._count_chunk(sequence)
        awaited = [
            (sequence, sequence.await_token(row), draft)
            for row, (sequence, draft) in enumerate(zip(sampled, sampled_drafts, strict=True))
        ]
        return Flight(plan, work, awaited, sampling, began, stopwatch, is_observed=drafted is not None)

    def _count_chunk(self, sequence: Sequence) -> None:
        """Tell of a prompt that takes several steps, now and then and at its end."""
        sequence.num_chunks += 1
        is_last = not sequence.num_uncomputed_tokens
        if sequence.num_chunks % CHUNKS_TOLD == 0 or (is_last and sequence.num_chunks > 1):
            self._out.progressed(sequence, "prefill", sequence.num_computed_tokens)
        if is_last:
            sequence.num_chunks = 0

    def _land(self) -> None:
        """Take the tokens of the step in flight, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self.landed = flight.work
        landed = flight.land()
        self._rate(flight, [one.emitted for one in landed])
        for one in landed:
            self._settle(one)

    def _settle(self, landed: Landed) -> None:
        """Tell of a sequence's tokens, or that there are none, and end it if that was all."""
        emitted, sequence = landed.emitted, landed.emitted.sequence
        if landed.error is None:
            self._commit_blocks(sequence)
            self._tell(emitted, landed.logprobs)
        else:
            # Whatever spoiled its logits may be in its blocks, too.
            self.pool.disown(sequence.block_table)
            self._fail(sequence, emitted.first_index, landed.error)

    def _commit_blocks(self, sequence: Sequence) -> None:
        self._offer(commit_blocks(sequence, self.pool))

    def _offer(self, hashes: Iterable[BlockHash]) -> None:
        if self._prefix_cache:
            for block_hash in hashes:
                self.exchange.offer(block_hash)

    def _tell(self, emitted: Emitted, logprobs: tuple[Logprobs, ...]) -> None:
        """Put out tokens, and end the sequence if these are the last."""
        sequence = emitted.sequence
        if emitted.token_ids[-1] in sequence.stop_ids:
            finish = FINISH_STOP
        elif emitted.first_index + len(emitted.token_ids) >= sequence.end_length:
            finish = sequence.end_finish
        else:
            finish = FINISH_NONE
        self._out.emitted(emitted, logprobs, finish)
        if finish:
            self._end(sequence)

    def _rate(self, flight: Flight, emitted: list[Emitted]) -> None:
        """Count the step in, from when the device could begin with it."""
        load, rates, now = self.load, self._rates, self._clock()
        num_emitted = sum(len(e.token_ids) for e in emitted)
        seconds = now - max(flight.began, self._landed_at)
        self._landed_at = now
        rates.add(flight.work, num_emitted, seconds)
        self._busy.add(flight.stopwatch.seconds(), seconds)
        load.prefill_tokens_per_s = self.exchange.prefill_tokens_per_s = rates.prefill.per_s
        load.decode_tokens_per_s = rates.decode.per_s
        load.step_s = rates.step_s
        load.device_busy_share = min(1.0, self._busy.per_s)
        load.num_output_tokens += num_emitted
        if self._speculation is not None and flight.is_observed:
            num_computed = sum(flight.plan.num_scheduled_tokens.values())
            is_decode = num_computed == len(flight.awaited) == len(emitted)
            live = [sequence for sequence in flight.plan.num_scheduled_tokens if sequence.state is not State.FINISHED]
            self._speculation.observe(StepOutcome(live, emitted, is_decode, seconds))
            load.num_drafted_tokens += sum(e.num_drafts for e in emitted)
            load.num_accepted_tokens += num_emitted - sum(1 for e in emitted if e.token_ids)

    def _count(self) -> None:
        load, now = self.load, self._clock()
        load.num_steps += 1
        load.num_running = len(self.running)
        load.num_waiting = len(self.waiting) + self.exchange.num_loading
        load.num_waiting_tokens = sum(sequence.num_uncomputed_tokens for sequence in self.waiting) + sum(
            count for count in [sequence.num_uncomputed_tokens for sequence in self.running] if count > 1
        )
        load.num_free_blocks = self.pool.num_free_blocks
        load.last_step_at = now
        load.is_idle = not (self.running or self.waiting)
        if load.is_idle and now - self._checked_at >= CHECK_INTERVAL_S:
            self._checked_at = now
            self._check()

    def _check(self) -> None:
        """With nothing running nobody may hold a block."""
        try:
            self.pool.check(())
        except InvariantViolation as violation:
            self.load.num_violations += 1
            log.error("books of the block pool do not balance", extra={"violation": violation.message})

    def _emit(self) -> StepOutput | None:
        out, self._out = self._out, Outbox()
        stored, removed = self.pool.take_changes()
        offloads = self.exchange.next_offloads(is_idle=not (self.running or self.waiting))
        data = self._runner.read_blocks([block_id for _, block_id in offloads]) if offloads else []
        if not self._prefix_cache:
            stored = removed = ()
        return out.output(stored, removed, tuple(zip([block_hash for block_hash, _ in offloads], data, strict=True)))

    # ---- beginnings and ends ----

    def _start(self, sequence: Sequence) -> None:
        """Tell of a request when the first of its sequences starts."""
        request = sequence.request
        if request.is_started:
            return
        request.is_started = True
        num_prompt = sequence.num_prompt_tokens
        num_cached = min(sequence.num_cached_tokens, num_prompt)
        self.load.num_prompt_tokens += num_prompt
        self.load.num_cached_tokens += num_cached
        self._out.started(request, num_prompt, num_cached, self._clock())

    def _fail(self, sequence: Sequence, index: int, error: ErrorInfo) -> None:
        self._finish(sequence, index, FINISH_ERROR, error)

    def _finish(self, sequence: Sequence, index: int, finish: int, error: ErrorInfo | None = None) -> None:
        """End a sequence without a token; the next would have been `token_ids[index]`."""
        self._out.finished(sequence, index, finish, error)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Let go of a sequence in whatever state it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence.state is State.LOADING:
            self.exchange.forget(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.free(sequence.release())
        sequence.state = State.FINISHED
        self._forget(sequence)
        request = sequence.request
        request.live.remove(sequence)
        if not request.live:
            del self._requests[request.request_id]
            self._out.ended(request)

    def _forget(self, sequence: Sequence) -> None:
        """What the drafter holds of a sequence that has no blocks any more."""
        if self._speculation is not None:
            self._speculation.forget(sequence)
