"""A sequence: one choice of a request as the engine sees it, tokens of which some are computed and some are not.

A prompt, the tokens that a stream emitted before a recovery, and the tokens that a preempted sequence must compute
again are all the same here: tokens beyond `num_computed_tokens`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from weft.columns import pack_u32, unpack_u32
from weft.hashing import BLOCK_SIZE, next_hash
from weft.messages import FINISH_LENGTH, FINISH_YIELD, BlockHash, SamplingParams, TokenizedRequest

# Stands in `token_ids` for a token that was sampled but not yet read from the device.
UNKNOWN_TOKEN: Final = -1


class State(enum.Enum):
    WAITING = "waiting"  # for admission
    LOADING = "loading"  # for blocks from the cache service
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """What the sequences of one request share."""

    request_id: str
    gateway: str
    epoch: int
    live: list[Sequence] = field(default_factory=list)  # those that have not ended
    is_started: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice.

    Ownership of its KV: positions [0, num_computed_tokens) are written in the blocks of `block_table`; the first
    `num_committed_blocks` blocks are full, carry a hash and are never written again; the rest are this sequence's
    alone.
    """

    request: Request
    arrival: int  # grows with every request taken in
    slot: int
    seed: int
    sampling: SamplingParams
    token_ids: list[int]  # prompt, then completion
    num_prompt_tokens: int
    end_length: int  # tokens at which it ends with `end_finish`
    stop_ids: frozenset[int]
    # What block 0 is chained to; None for a sequence whose blocks are shared with nobody.
    root: BlockHash | None
    hashes: list[BlockHash]  # of the full blocks of `token_ids`, as far as they are known
    state: State = State.WAITING
    num_computed_tokens: int = 0
    num_committed_blocks: int = 0
    num_chunks: int = 0  # steps that computed some of what it lacks, until it lacks no more
    num_cached_tokens: int = 0  # found at its last admission
    block_table: list[int] = field(default_factory=list)
    admitted_at: float | None = None  # seconds, monotonic; the first time
    # Tokens at the end that were sampled but not read yet, and the row of the last one in the step that sampled it.
    num_pending_tokens: int = 0
    pending_row: int = 0
    end_finish: int = FINISH_LENGTH  # or FINISH_YIELD

    @property
    def num_output_tokens(self) -> int:
        """Index in the completion of the token that comes next."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def is_complete(self) -> bool:
        """Whether it ends with the tokens it has, a pending one included."""
        return len(self.token_ids) >= self.end_length

    def await_token(self, row: int) -> int:
        """Make room for a token that was sampled as `row` of a step. Returns: its index in `token_ids`."""
        self.token_ids.append(UNKNOWN_TOKEN)
        self.num_pending_tokens += 1
        self.pending_row = row
        return len(self.token_ids) - 1

    def extend_hashes(self) -> list[BlockHash]:
        """Continue the chain over every full block of known tokens, and return it. Mutates: `hashes`."""
        if self.root is None:
            return self.hashes
        for start in range(len(self.hashes) * BLOCK_SIZE, self.num_known_tokens - BLOCK_SIZE + 1, BLOCK_SIZE):
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(next_hash(parent, pack_u32(self.token_ids[start : start + BLOCK_SIZE])))
        return self.hashes

    def release(self) -> list[int]:
        """Give up all blocks and what was computed; its tokens stay. The caller frees the blocks returned."""
        blocks, self.block_table = self.block_table, []
        self.num_computed_tokens = self.num_committed_blocks = 0
        return blocks


def ending(num_tokens: int, stop_after: int | None, end_length: int) -> tuple[int, int]:
    """Tokens at which a sequence that has `num_tokens` ends, and how: by yielding, if that comes before its own end."""
    if stop_after is not None and num_tokens + stop_after < end_length:
        return num_tokens + stop_after, FINISH_YIELD
    return end_length, FINISH_LENGTH


def make_sequences(
    request: TokenizedRequest,
    *,
    arrival: int,
    max_model_len: int,
    eos_token_ids: frozenset[int],
    root: BlockHash | None,
    hashes: list[bytes],
    stop_after: int | None = None,
) -> Request:
    """The sequences of a request that was checked, as the `live` ones of its `Request`.

    Args:
        root, hashes: the prompt's hash chain, as far as it is known.
        stop_after: new tokens after which each yields.
    """
    group = Request(request.request_id, request.gateway, request.epoch)
    sampling, prompt = request.sampling, unpack_u32(request.prompt_token_ids)
    end_length = max_model_len
    if sampling.max_tokens is not None:
        end_length = min(end_length, len(prompt) + sampling.max_tokens)
    stop_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_ids |= eos_token_ids
    for choice in request.choices:
        token_ids = prompt + unpack_u32(choice.emitted)
        own_end, end_finish = ending(len(token_ids), stop_after, end_length)
        group.live.append(
            Sequence(
                request=group,
                arrival=arrival,
                slot=choice.slot,
                seed=choice.seed,
                sampling=sampling,
                token_ids=token_ids,
                num_prompt_tokens=len(prompt),
                end_length=own_end,
                stop_ids=stop_ids,
                root=root,
                hashes=[BlockHash(block_hash) for block_hash in hashes],
                end_finish=end_finish,
            )
        )
    return group
