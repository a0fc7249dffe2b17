"""What the next step computes.

There is no prefill phase and no decode phase: a sequence has tokens of which the first `num_computed_tokens` are
computed, and a step computes some more of them under a token budget. So chunked prefill, prefix hits, preemption and
recovery are one code path. Running sequences that lack one token (decodes) come first, then running ones that lack
more, then waiting ones in their order; some policies do otherwise. When blocks run out, the sequence admitted last
gives all of its back and computes its tokens again later (preemption by recompute): so the one admitted first always
goes on, ends, and nobody starves. Source of the idea: vLLM v1 scheduler; chunked prefill: Agrawal et al. 2024
(Sarathi-Serve), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from weft.errors import InvalidRequest
from weft.messages import BlockHash
from worker_svc.blocks import BlockPool
from worker_svc.sequence import Sequence, State

# Blocks that a sequence holds at most beyond those of its tokens.
BLOCKS_AHEAD: Final = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may be; `policy` is a key of `POLICIES`, `reserve` one of `RESERVATIONS`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    policy: str = "chunked"
    reserve: str = "paged"
    max_model_len: int = 0  # tokens that `reserve_max` keeps for each sequence


class Work(msgspec.Struct, frozen=True):
    """What a step computes, in the numbers that its time follows from."""

    num_new: int = 0  # tokens of prompts
    num_seen: float = 0.0  # tokens that these see, summed over them
    num_sequences: int = 0  # decodes
    num_context_tokens: float = 0.0  # that these see, summed over them
    num_chunks: int = 0  # prompts, or pieces of them


class StepPlan(msgspec.Struct, frozen=True):
    """What a step does. Block tables have room for it already."""

    # Tokens that each sequence computes, in the order of their rows: its next ones after `num_computed_tokens`.
    num_scheduled_tokens: dict[Sequence, int]
    admitted: tuple[Sequence, ...]  # waiting until now; some may get their first tokens only in a later step
    preempted: tuple[Sequence, ...]  # running until now; back at the head of `waiting`
    rejected: tuple[tuple[Sequence, InvalidRequest], ...]  # can never run; in neither list any more
    # Blocks (source, target) whose bytes must be copied, in this order, before anything is computed.
    copies: tuple[tuple[int, int], ...]

    @property
    def is_decode(self) -> bool:
        """Whether each sequence computes its last token and nothing else."""
        return all(
            count == 1 and sequence.num_uncomputed_tokens == 1 for sequence, count in self.num_scheduled_tokens.items()
        )

    def work(self) -> Work:
        """What there is to do, before any of it is counted as computed."""
        num_new, num_seen, num_sequences, num_context, num_chunks = 0, 0.0, 0, 0, 0
        for sequence, count in self.num_scheduled_tokens.items():
            num_computed = sequence.num_computed_tokens
            if count == 1 and len(sequence.token_ids) - num_computed == 1:
                num_sequences += 1
                num_context += num_computed + 1
            else:
                num_chunks += 1
                num_new += count
                num_seen += count * (num_computed + 0.5 * count)
        return Work(num_new, num_seen, num_sequences, num_context, num_chunks)


@dataclass(slots=True)
class _Draft:
    waiting: list[Sequence]
    running: list[Sequence]
    pool: BlockPool
    limits: Limits
    now: float
    token_budget: int
    is_whole: bool = False  # prompts are not cut, whatever the budget
    scheduled: dict[Sequence, int] = field(default_factory=dict)
    computing: set[BlockHash] = field(default_factory=set)  # of the blocks that prefills fill in this step
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    rejected: list[tuple[Sequence, InvalidRequest]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


def plan_step(
    waiting: list[Sequence], running: list[Sequence], pool: BlockPool, limits: Limits, now: float
) -> StepPlan:
    """Plan one step.

    Args:
        waiting: sequences to admit, the first of which goes first.
        running: sequences in the order of their admission.
        now: monotonic seconds.

    Mutates: both lists, the pool, and block tables and states of the sequences it moves. The caller computes what is
    planned and then advances `num_computed_tokens`.
    """
    draft = _Draft(waiting, running, pool, limits, now, limits.max_num_batched_tokens)
    POLICIES[limits.policy](draft)
    return StepPlan(
        num_scheduled_tokens=draft.scheduled,
        admitted=tuple(draft.admitted),
        preempted=tuple(draft.preempted),
        rejected=tuple(draft.rejected),
        copies=tuple(draft.copies),
    )


def make_room(sequence: Sequence, count: int, pool: BlockPool, num_spared: int) -> int:
    """Give a sequence that is in the plan blocks for drafted tokens. Returns: how many of `count` have room.

    Args:
        num_spared: free blocks to leave for tokens that are no guesses.
    """
    end = sequence.num_computed_tokens + 1 + count
    missing = pool.blocks_for(end) - len(sequence.block_table)
    if missing > 0:
        sequence.block_table += pool.allocate(max(0, min(missing, pool.num_free_blocks - num_spared)))
    room = len(sequence.block_table) * pool.block_size - sequence.num_computed_tokens - 1
    return min(count, room)


def commit_blocks(sequence: Sequence, pool: BlockPool) -> list[BlockHash]:
    """Give the blocks that became full of known tokens their hashes. Returns: these.

    Mutates: the pool, and the sequence's count and chain of hashes.
    """
    full = min(sequence.num_computed_tokens, sequence.num_known_tokens) // pool.block_size
    if full <= sequence.num_committed_blocks:
        return []
    hashes = sequence.extend_hashes()[:full]
    fresh = hashes[sequence.num_committed_blocks :]
    for block_id, block_hash in zip(sequence.block_table[sequence.num_committed_blocks :], fresh, strict=False):
        pool.commit(block_id, block_hash)
    sequence.num_committed_blocks = len(hashes)
    return fresh


def _continue_running(draft: _Draft) -> None:
    """Decodes first, then those that lack more than one token."""
    # Those that end with the token they wait for need no further one.
    going_on = [sequence for sequence in draft.running if len(sequence.token_ids) < sequence.end_length]
    decodes = [sequence for sequence in going_on if len(sequence.token_ids) - sequence.num_computed_tokens == 1]
    size, scheduled = draft.pool.block_size, draft.scheduled
    for sequence in decodes:
        has_room = len(sequence.block_table) * size > sequence.num_computed_tokens
        if has_room and sequence.state is State.RUNNING and (draft.token_budget > 0 or draft.is_whole):
            # Nearly always, and for each token: what `_continue` comes to where no block is needed.
            scheduled[sequence] = 1
            draft.token_budget -= 1
        else:
            _continue(draft, sequence)
    if len(decodes) < len(going_on):
        for sequence in [sequence for sequence in going_on if sequence not in draft.scheduled]:
            _continue(draft, sequence)


def _continue(draft: _Draft, sequence: Sequence) -> None:
    """Schedule as many tokens of a running sequence as budget and blocks allow, preempting others for at least one."""
    if sequence.state is not State.RUNNING or sequence in draft.scheduled:
        return
    if draft.token_budget <= 0 and not draft.is_whole:
        return
    pool, running = draft.pool, draft.running
    room = len(sequence.block_table) * pool.block_size - sequence.num_computed_tokens
    while not room and not pool.num_free_blocks and not _take_back(draft):
        if running[-1] is not sequence:
            _preempt(draft, running[-1])
        elif len(running) > 1:
            # It waits with the blocks it has until an earlier one ends, or takes them.
            return
        else:
            running.pop()
            pool.free(sequence.release())
            _reject(draft, sequence, len(sequence.token_ids))
            return
    _schedule(draft, sequence, room + pool.num_free_blocks * pool.block_size)


def _schedule(draft: _Draft, sequence: Sequence, room: int) -> None:
    """Give a sequence tokens of the budget, `room` at most, and blocks to hold them."""
    count = min(sequence.num_uncomputed_tokens, room)
    if not draft.is_whole:
        count = min(count, draft.token_budget)
    missing = draft.pool.blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_table)
    if missing > 0:
        sequence.block_table += draft.pool.allocate(max(missing, _num_ahead(sequence, draft.pool)))
    draft.scheduled[sequence] = count
    draft.token_budget -= count
    if count > 1:
        filled = (sequence.num_computed_tokens + count) // draft.pool.block_size
        draft.computing.update(sequence.hashes[sequence.num_committed_blocks : filled])


def _num_ahead(sequence: Sequence, pool: BlockPool) -> int:
    """Blocks to take at once while more than half are free: taken together they lie together, in few runs of slots.

    Attention in torch works on runs. 16 sequences that grow by one block in turn have as many runs as blocks, and a
    step of a 125M-parameter model took 65 ms where one run each took 34 ms (two threads, AMD EPYC, 2026).
    """
    end = min(sequence.end_length, len(sequence.token_ids) + BLOCKS_AHEAD * pool.block_size)
    return min(pool.blocks_for(end) - len(sequence.block_table), pool.num_free_blocks - pool.num_blocks // 2)


def _take_back(draft: _Draft) -> bool:
    """Free what running sequences hold beyond their tokens, unless a step is under way. Returns: whether it was any.

    What is reserved stays.
    """
    if draft.limits.reserve != "paged":
        return False
    pool = draft.pool
    spare = {
        sequence: sequence.block_table[pool.blocks_for(len(sequence.token_ids)) :]
        for sequence in draft.running
        if not sequence.num_pending_tokens
    }
    for sequence, block_ids in spare.items():
        pool.free(block_ids)
        del sequence.block_table[pool.blocks_for(len(sequence.token_ids)) :]
    return any(spare.values())


def _preempt(draft: _Draft, sequence: Sequence) -> None:
    draft.running.remove(sequence)
    draft.token_budget += draft.scheduled.pop(sequence, 0)
    draft.pool.free(sequence.release())
    sequence.state = State.WAITING
    draft.waiting.insert(0, sequence)
    draft.preempted.append(sequence)


def _reject(draft: _Draft, sequence: Sequence, num_tokens: int) -> None:
    capacity = draft.pool.num_blocks * draft.pool.block_size
    error = InvalidRequest(f"{num_tokens} tokens are more than this worker's KV memory holds ({capacity} tokens)")
    draft.rejected.append((sequence, error))


def _plan_chunked(draft: _Draft) -> None:
    """Continuous batching, prompts in chunks: the first in line starts when there are a place, budget and blocks.

    It waits a step if this one computes the very block it lacks: the choices of a request with n > 1, and requests
    that arrive together with one long prefix, thus compute it once.
    Invariant: no step computes more than the budget, and no decode waits for a prompt. Source: Sarathi-Serve.
    """
    _continue_running(draft)
    _admit_in_line(draft)


def _plan_continuous(draft: _Draft) -> None:
    """As chunked, but for prompts, which are never cut: one may take a step far over the budget.

    Invariant: each step computes a token of every running sequence. Source: Yu et al. 2022 (Orca), section 3.
    """
    draft.is_whole = True
    _plan_chunked(draft)


def _plan_prefill_first(draft: _Draft) -> None:
    """Whole prompts of those in line, and nothing else; all decodes, whatever the budget, in steps without prompts.

    Invariant: no step has both. First tokens come soonest, and running sequences wait for every prompt.
    Source: vLLM before its version 1 (Kwon et al. 2023), which the stalls of Sarathi-Serve's figure 1 are of.
    """
    draft.is_whole = True
    _admit_in_line(draft)
    if not draft.scheduled:
        _continue_running(draft)


def _plan_static(draft: _Draft) -> None:
    """A batch starts when the one before has wholly ended, so the places of those that end early stay empty.

    Invariant: no step admits anybody while others run. Source: the baseline that continuous batching is measured
    against (Yu et al. 2022, Orca, section 2).
    """
    _continue_running(draft)
    if draft.running or draft.preempted:
        return
    while draft.waiting and len(draft.running) < draft.limits.max_num_seqs:
        if not _admit(draft):
            return


def _admit_in_line(draft: _Draft) -> None:
    if draft.preempted:
        return
    while draft.waiting and draft.token_budget > 0 and len(draft.running) < draft.limits.max_num_seqs:
        if _lacks_what_is_computed(draft, draft.waiting[0]) or not _admit(draft):
            return


def _lacks_what_is_computed(draft: _Draft, sequence: Sequence) -> bool:
    if not draft.computing:
        return False
    hashes = sequence.extend_hashes()
    num_hits = len(draft.pool.lookup(hashes))
    return num_hits < len(hashes) and hashes[num_hits] in draft.computing


def _admit(draft: _Draft) -> bool:
    """Take the first waiting sequence out of line; False if it must wait for blocks."""
    sequence, pool = draft.waiting[0], draft.pool
    num_tokens = len(sequence.token_ids)
    reserved_length = RESERVATIONS[draft.limits.reserve](sequence, draft.limits)
    num_reserved = pool.blocks_for(reserved_length)
    if max(pool.blocks_for(num_tokens), num_reserved) > pool.num_blocks:
        _reject(draft, draft.waiting.pop(0), max(num_tokens, reserved_length))
        return True
    hits = pool.lookup(sequence.extend_hashes())
    # At least one token must be computed, or there would be no logits to sample from: if all are found, the last
    # one is computed again, in a copy of its block.
    is_whole = bool(hits) and len(hits) * pool.block_size == num_tokens
    num_missing = max(pool.blocks_for(num_tokens), num_reserved) - len(hits) + is_whole + pool.num_cached_among(hits)
    if not _has_blocks(draft, num_missing) and not (_take_back(draft) and _has_blocks(draft, num_missing)):
        if draft.running or not is_whole:
            return False
        # Alone, and the pool has no block for the copy: compute the last block instead.
        hits.pop()
        is_whole = False
    pool.touch(hits)
    if is_whole:
        target = pool.copy_on_write(hits[-1])
        draft.copies.append((hits[-1], target))
        hits[-1] = target
    sequence.block_table = hits
    sequence.num_committed_blocks = len(hits) - is_whole
    sequence.num_computed_tokens = sequence.num_cached_tokens = len(hits) * pool.block_size - is_whole
    sequence.block_table += pool.allocate(max(0, num_reserved - len(hits)))
    if sequence.admitted_at is None:
        sequence.admitted_at = draft.now
    sequence.state = State.RUNNING
    draft.running.append(draft.waiting.pop(0))
    draft.admitted.append(sequence)
    if draft.token_budget > 0:
        _schedule(draft, sequence, num_tokens)
    return True


def _has_blocks(draft: _Draft, count: int) -> bool:
    """Whether `count` blocks are left beyond what running sequences need.

    These need all of the blocks of their tokens, and one more to grow; with less, whoever is admitted now would be
    the first to be preempted.
    """
    if draft.limits.reserve != "paged":
        return count <= draft.pool.num_free_blocks
    blocks_for, running = draft.pool.blocks_for, draft.running
    promised = sum(max(0, blocks_for(len(s.token_ids)) - len(s.block_table) + 1) for s in running)
    return count + promised <= draft.pool.num_free_blocks


def _next_power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


POLICIES: Final[dict[str, Callable[[_Draft], None]]] = {
    "chunked": _plan_chunked,
    "continuous": _plan_continuous,
    "prefill_first": _plan_prefill_first,
    "static": _plan_static,
}
# Tokens that a sequence gets blocks for when it is admitted. `paged` takes blocks as tokens come; the others are the
# baselines of Kwon et al. 2023 (vLLM), section 6.1, which keep room to the end so that nobody is ever preempted.
RESERVATIONS: Final[dict[str, Callable[[Sequence, Limits], int]]] = {
    "paged": lambda sequence, limits: 0,
    "reserve_max": lambda sequence, limits: max(limits.max_model_len, sequence.end_length),
    "reserve_pow2": lambda sequence, limits: min(
        sequence.num_prompt_tokens + _next_power_of_two(sequence.end_length - sequence.num_prompt_tokens),
        max(limits.max_model_len, sequence.end_length),
    ),
    "reserve_oracle": lambda sequence, limits: sequence.end_length,
}
