"""Every message that crosses the bus, in the order in which a request meets them.

A message is a msgpack map whose `t` names its type (an integer of this file's, never reused) and whose `v` is the
contract's version. Types and bounds are checked while decoding, unknown fields are refused: see `codec.decode`.
Token ids and other number columns travel as packed little-endian bytes (`columns.py` packs and unpacks them).
All times are `time.time()` seconds; durations are seconds.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, NewType

import msgspec
from msgspec import Meta

from weft import limits
from weft.errors import WeftError, from_code

VERSION: Final = 1

# 16 bytes of blake2b over a block's tokens and everything before them: see `hashing.py`.
BlockHash = NewType("BlockHash", bytes)

Role = Literal["gateway", "tokenizer", "scheduler", "worker", "cache", "supervisor"]
State = Literal["starting", "ready", "draining", "dead"]

Name = Annotated[str, Meta(max_length=limits.MAX_NAME_CHARS)]
Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Text = Annotated[str, Meta(max_length=limits.MAX_MESSAGE_BYTES)]
Sentence = Annotated[str, Meta(max_length=4096)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U53 = Annotated[int, Meta(ge=0, le=2**53)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack itself has no larger integer
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
TokenIds = Annotated[bytes, Meta(max_length=4 * limits.MAX_PROMPT_TOKENS)]  # uint32 column
BlockHashes = Annotated[bytes, Meta(max_length=16 * limits.MAX_IDS_PER_MESSAGE)]  # 16 bytes each
U8Column = Annotated[bytes, Meta(max_length=limits.MAX_FRAME_ROWS)]
U32Column = Annotated[bytes, Meta(max_length=4 * limits.MAX_FRAME_ROWS)]
Data = Annotated[bytes, Meta(max_length=limits.MAX_MESSAGE_BYTES)]
Stamps = Annotated[dict[Name, Seconds], Meta(max_length=32)]
Priority = Annotated[int, Meta(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)]  # lower is earlier
WorkerRole = Literal["both", "prefill", "decode"]


class ErrorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `WeftError` on the wire."""

    code: Name
    message: Sentence
    param: Name | None = None
    retry_after_s: Seconds | None = None

    @classmethod
    def of(cls, error: WeftError) -> ErrorInfo:
        return cls(error.code, error.message[:4096], error.param, error.retry_after_s)

    def to_error(self) -> WeftError:
        return from_code(self.code, self.message, param=self.param, retry_after_s=self.retry_after_s)


# ---- 1 gateway → tokenizer ------------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Name
    content: Text
    name: Name | None = None


class ChatPrompt(msgspec.Struct, frozen=True, tag=1, tag_field="t", forbid_unknown_fields=True):
    """A conversation that the model's chat template turns into text."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
    add_generation_prompt: bool = True
    # When the request arrived: a template that prints the date prints the same one after a recovery.
    now: Seconds = 0.0


class TextPrompt(msgspec.Struct, frozen=True, tag=2, tag_field="t", forbid_unknown_fields=True):
    text: Text
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, tag=3, tag_field="t", forbid_unknown_fields=True):
    token_ids: TokenIds


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen. Stop strings are not here: the gateway, which owns the text, finds them.

    `max_tokens` counts from the prompt's end, so tokens emitted before a recovery are part of it; None means
    up to the model's context.
    """

    max_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_PROMPT_TOKENS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_PROMPT_TOKENS)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=limits.MAX_TOKEN_ID)] = 0  # 0 = all
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, le=limits.MAX_TOKEN_ID)], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(max_length=limits.MAX_LOGIT_BIAS),
    ] = {}
    stop_token_ids: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=limits.MAX_TOKEN_ID)], ...], Meta(max_length=limits.MAX_STOP_TOKEN_IDS)
    ] = ()
    ignore_eos: bool = False
    # None = no logprobs; 0 = of the sampled token only; k = of the k likeliest as well.
    logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One completion of a prompt; a request with n > 1 has several, which share the prompt's blocks.

    `slot` is the gateway's name for the stream, never used twice by one gateway. `emitted` are the tokens that
    the gateway has already: after a recovery they are computed as if they were prompt, and generation goes on.
    """

    slot: U32
    seed: U64
    emitted: TokenIds = b""


class GenerateRequest(msgspec.Struct, frozen=True, tag=1, tag_field="t", forbid_unknown_fields=True):
    """Hop 1, on `subjects.tokenize(model)`. Also, with a higher epoch, every recovery."""

    request_id: Id
    epoch: U32
    gateway: Id
    model: Name
    prompt: Prompt
    sampling: SamplingParams
    choices: Annotated[list[Choice], Meta(min_length=1, max_length=limits.MAX_CHOICES)]
    # Part of every block hash: two requests share cached blocks only if their salts are equal.
    cache_salt: Name = ""
    tenant: Name = ""
    priority: Priority = 0
    slo_class: Name = ""  # which objectives a scheduler has for it
    yield_epoch: U32 = 0  # the last epoch that began because a worker handed the request back as it was told to
    stamps: Stamps = {}  # when each hop handled the request
    v: Literal[1] = 1


# ---- 2 tokenizer → scheduler, 3 scheduler → worker ------------------------------------------------------------------


class TokenizedRequest(msgspec.Struct, frozen=True, tag=2, tag_field="t", forbid_unknown_fields=True):
    """Hop 2, on `subjects.schedule(model)`. `block_hashes` covers the full blocks of the prompt, not of `emitted`."""

    request_id: Id
    epoch: U32
    gateway: Id
    model: Name
    prompt_token_ids: TokenIds
    block_hashes: BlockHashes
    sampling: SamplingParams
    choices: Annotated[list[Choice], Meta(min_length=1, max_length=limits.MAX_CHOICES)]
    cache_salt: Name = ""
    tenant: Name = ""
    priority: Priority = 0
    slo_class: Name = ""
    yield_epoch: U32 = 0
    stamps: Stamps = {}
    v: Literal[1] = 1

    @property
    def is_recovered(self) -> bool:
        """Whether it has begun and lost whoever held it."""
        return self.epoch > self.yield_epoch

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids) // 4

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV the worker must compute or find before the first new one, over all choices."""
        num_bytes = len(self.prompt_token_ids)
        for choice in self.choices:
            num_bytes += len(choice.emitted)
        return num_bytes // 4


class Assignment(msgspec.Struct, frozen=True, tag=3, tag_field="t", forbid_unknown_fields=True):
    """Hop 3, on `subjects.assign(worker)`.

    With `stop_after` the worker ends each choice with `FINISH_YIELD` after so many new tokens, unless it has ended by
    itself; the gateway then sends the request into the ring again, as after a recovery.
    """

    request: TokenizedRequest
    scheduler: Id
    stop_after: Annotated[int, Meta(ge=1, le=limits.MAX_PROMPT_TOKENS)] | None = None
    v: Literal[1] = 1


class Declined(msgspec.Struct, frozen=True, tag=4, tag_field="t", forbid_unknown_fields=True):
    """A worker without room, or one that drains, hands an assignment back, on `subjects.declined(scheduler)`."""

    request: TokenizedRequest
    worker: Id
    v: Literal[1] = 1


# ---- 4 worker → gateway ---------------------------------------------------------------------------------------------

FINISH_NONE: Final = 0
FINISH_STOP: Final = 1  # EOS or a stop token: the row's last token, counted but never shown
FINISH_LENGTH: Final = 2  # max_tokens or the model's context
FINISH_ABORT: Final = 3  # cancelled; the gateway knows why
FINISH_ERROR: Final = 4  # this sequence alone failed; `TokenFrame.errors` says how
FINISH_YIELD: Final = 5  # handed back after `Assignment.stop_after` tokens: it goes on elsewhere


class RowLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log probabilities of one row's tokens: `sampled` is float32 [count], the others [count, k], likeliest first."""

    row: U32
    k: Annotated[int, Meta(ge=0, le=limits.MAX_TOP_LOGPROBS)]
    sampled: U32Column
    top_token_ids: U32Column
    top_values: U32Column


class TokenFrame(msgspec.Struct, frozen=True, tag=5, tag_field="t", forbid_unknown_fields=True):
    """What one engine step produced for one gateway, on `subjects.frames(gateway)`: columns, a row a stream.

    Row i is stream `slots[i]` at `epochs[i]`; its tokens are the next `counts[i]` of `token_ids`, the first of
    which has the index `first_indices[i]` in the completion. A count of 0 carries only a finish.
    """

    worker: Id
    worker_epoch: U53
    sequence: U53  # numbers the frames from this worker to this gateway, from 0
    slots: U32Column
    epochs: U32Column
    first_indices: U32Column
    counts: U8Column
    finishes: U8Column
    token_ids: TokenIds
    logprobs: list[RowLogprobs] = []
    errors: dict[U32, ErrorInfo] = {}  # by row
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        rows = len(self.counts)
        if not len(self.slots) == len(self.epochs) == len(self.first_indices) == 4 * rows == 4 * len(self.finishes):
            raise ValueError("columns differ in length")
        if len(self.token_ids) != 4 * sum(self.counts):
            raise ValueError("token_ids and counts differ")
        for entry in self.logprobs:
            if entry.row >= rows:
                raise ValueError("logprobs for a row that is not there")
            count = self.counts[entry.row]
            if len(entry.sampled) != 4 * count or not (
                len(entry.top_token_ids) == len(entry.top_values) == 4 * count * entry.k
            ):
                raise ValueError("logprobs and counts differ")


# ---- 5 any → gateway ------------------------------------------------------------------------------------------------


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one candidate looked to the route policy: `load` in sequences held, `matched_blocks` of the prompt cached."""

    worker: Name  # not matched against the pattern of ids, which takes 1.5 µs for each
    load: U32
    waiting_tokens: U53
    matched_blocks: U32


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which worker, by which rule of the policy, and how some of the candidates looked at that moment, it first."""

    worker: Id
    policy: Name
    rule: Name
    num_candidates: U32
    least_load: U32  # of a candidate, in sequences
    num_prompt_blocks: U32
    scores: Annotated[tuple[Score, ...], Meta(max_length=limits.MAX_SCORES)]
    expected_ttft_s: Seconds | None = None
    stop_after: U32 | None = None  # tokens of each choice after which the worker is to hand it back


class BacklogPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a request waits: `num_waiting` of its model, itself among them, in the order of a policy."""

    num_waiting: U53
    num_workers: U32  # that serve the model, none of which has room for it
    admit: Name  # the policy that let it in
    order: Name


class StreamEvent(msgspec.Struct, frozen=True, tag=6, tag_field="t", forbid_unknown_fields=True):
    """News about a request that is no token, on `subjects.events(gateway)`.

    `queued`    a scheduler holds it in its backlog (sent only if it does not go on at once); `place` says how
    `started`   a worker has planned its first step; says what the prefix cache gave
    `prefill`   a prompt that takes several steps: `num_chunks` of them so far (sent at every eighth, and at the end)
    `preempted` a worker took its blocks for others, and will compute it again
    `rejected`  it will not be served, by its own fault or admission's: final, `error` says why
    `lost`      the sender could not hand it on, or hands it back (draining): the gateway recovers it
    """

    request_id: Id
    epoch: U32
    kind: Literal["queued", "started", "prefill", "preempted", "rejected", "lost"]
    role: Role
    instance: Id
    error: ErrorInfo | None = None
    num_prompt_tokens: U53 = 0
    num_cached_tokens: U53 = 0
    stamps: Stamps = {}
    place: BacklogPlace | None = None
    num_chunks: U53 = 0
    num_computed_tokens: U53 = 0  # of the sequence that this is about
    v: Literal[1] = 1


class Placed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request that a scheduler has sent to a worker, and why there."""

    request_id: Id
    epoch: U32
    num_prompt_tokens: U53
    stamps: Stamps
    decision: Decision


class Decisions(msgspec.Struct, frozen=True, tag=30, tag_field="t", forbid_unknown_fields=True):
    """What a scheduler has decided of late, on `subjects.events(gateway)`: for people who ask, so it need not be soon.

    A message that is lost costs explanations and nothing else.
    """

    scheduler: Id
    placed: Annotated[list[Placed], Meta(max_length=limits.MAX_PLACED)]
    v: Literal[1] = 1


class Claims(msgspec.Struct, frozen=True, tag=7, tag_field="t", forbid_unknown_fields=True):
    """What the sender holds for a gateway, twice a second, on `subjects.events(gateway)`.

    A claim renews a request's lease. A request that nobody has claimed for `CLAIM_LEASE_S` was lost on the way,
    and the gateway recovers it: no holder needs to notice that it lost something.
    """

    role: Role
    instance: Id
    request_ids: Annotated[list[Id], Meta(max_length=limits.MAX_FRAME_ROWS)]
    epochs: U32Column
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        if len(self.epochs) != 4 * len(self.request_ids):
            raise ValueError("epochs and request_ids differ")


# ---- 6 gateway → schedulers, workers --------------------------------------------------------------------------------


class Cancel(msgspec.Struct, frozen=True, tag=8, tag_field="t", forbid_unknown_fields=True):
    """Broadcast on `subjects.CANCEL`: drop the request at `epoch` and below.

    With `slots`, only those of its choices are dropped; without, all of it. With `num_output_tokens`, what is dropped
    has come to its end by a stop string, which only the gateway sees: so many tokens of each choice are its answer, and
    the worker that has it tells so (`Ended`). Without, nobody reads it, and how long it would have been is not known.
    """

    request_id: Id
    epoch: U32
    gateway: Id
    slots: U32Column = b""
    num_output_tokens: U32Column = b""  # of all epochs
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.slots and self.num_output_tokens and len(self.slots) != len(self.num_output_tokens):
            raise ValueError("columns differ in length")


# ---- 7-9 status -----------------------------------------------------------------------------------------------------


class WorkerStatus(msgspec.Struct, frozen=True, tag=9, tag_field="t", forbid_unknown_fields=True):
    """A worker's room and load, on `subjects.status(worker)`, twice a second and on change.

    `accepted` counts, by scheduler, the sequences ever taken from it since `worker_epoch` began: what a scheduler
    has sent beyond its count is still on the way. All other numbers are of this moment.
    """

    worker: Id
    worker_epoch: U53
    model: Name
    state: State
    max_num_seqs: U32  # sequences it will hold, running and waiting
    num_running: U32
    num_waiting: U32
    num_waiting_tokens: U53  # tokens still to be prefilled
    num_blocks: U32
    num_free_blocks: U32  # free or only cached
    accepted: Annotated[dict[Id, U53], Meta(max_length=1024)]
    kv_sequence: U53  # of the last KvEvents sent
    prefill_tokens_per_s: Seconds = 0.0  # measured; 0 = not yet
    decode_tokens_per_s: Seconds = 0.0
    role: WorkerRole = "both"
    step_s: Seconds = 0.0  # of late; what a decode waits for its next token
    block_load_s: Seconds = 0.0  # of late; a KV block from the cache service; 0 = not measured, or it cannot be had
    v: Literal[1] = 1


class Ended(msgspec.Struct, frozen=True, tag=28, tag_field="t", forbid_unknown_fields=True):
    """Choices that ended in a step, on `subjects.ended(worker)`: schedulers learn lengths by them, and charge tenants.

    Row i is a choice of `request_ids[i]`. A message that is lost costs a little knowledge and nothing else.
    """

    worker: Id
    model: Name
    request_ids: Annotated[list[Id], Meta(max_length=limits.MAX_FRAME_ROWS)]
    tenants: Annotated[list[Name], Meta(max_length=limits.MAX_FRAME_ROWS)]
    num_prompt_tokens: U32Column
    num_output_tokens: U32Column  # of all epochs
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        rows = len(self.request_ids)
        if not 4 * rows == 4 * len(self.tenants) == len(self.num_prompt_tokens) == len(self.num_output_tokens):
            raise ValueError("columns differ in length")


class KvEvents(msgspec.Struct, frozen=True, tag=10, tag_field="t", forbid_unknown_fields=True):
    """Which blocks a holder gained and lost, on `subjects.kv(holder)`; at most one a step.

    `sequence` grows by one a message: a reader that misses one asks for a snapshot (`Control`), whose answer is
    a KvEvents with `snapshot` set, which replaces all that was known.
    """

    holder: Id
    epoch: U53
    sequence: U53
    stored: BlockHashes
    removed: BlockHashes = b""
    snapshot: bool = False
    v: Literal[1] = 1


class Heartbeat(msgspec.Struct, frozen=True, tag=11, tag_field="t", forbid_unknown_fields=True):
    """I am here, on `subjects.alive(role, instance)`, twice a second. The supervisor sends `dead` for a dead child.

    `epoch` tells one life of an instance from the next (microseconds at its start).
    """

    role: Role
    instance: Id
    epoch: U53
    state: State
    models: Annotated[list[Name], Meta(max_length=256)] = []
    v: Literal[1] = 1


class ScaleAdvice(msgspec.Struct, frozen=True, tag=29, tag_field="t", forbid_unknown_fields=True):
    """How many workers a model should have, on `subjects.scale(model)`, twice a second and at once from zero.

    Every scheduler tells what waits with it; the one with the lowest name adds all up and sets `target`. Whoever starts
    workers makes it so: the target is absolute, so a message that is lost or comes twice changes nothing.
    """

    scheduler: Id
    model: Name
    num_waiting: U53 = 0  # requests in this scheduler's backlog
    num_waiting_tokens: U53 = 0  # that these have to be prefilled
    num_arrived: U53 = 0  # requests that this scheduler ever saw
    target: Annotated[int, Meta(ge=0, le=limits.MAX_WORKERS)] | None = None  # None from those that do not decide
    reason: Sentence = ""
    drain: Annotated[list[Id], Meta(max_length=limits.MAX_WORKERS)] = []  # ready workers, if there are too many
    v: Literal[1] = 1


# ---- 10 worker ↔ cache (request / reply) ----------------------------------------------------------------------------


class BlockHas(msgspec.Struct, frozen=True, tag=12, tag_field="t", forbid_unknown_fields=True):
    """Which of these blocks does the shard hold? Answered by BlockHasReply."""

    keys: BlockHashes
    v: Literal[1] = 1


class BlockHasReply(msgspec.Struct, frozen=True, tag=13, tag_field="t", forbid_unknown_fields=True):
    held: Annotated[bytes, Meta(max_length=limits.MAX_IDS_PER_MESSAGE)]  # uint8, 1 = held, in the order asked
    v: Literal[1] = 1


class BlockGet(msgspec.Struct, frozen=True, tag=14, tag_field="t", forbid_unknown_fields=True):
    """Send these blocks. Answered by BlockData with those held, at most `max_bytes` of them."""

    keys: BlockHashes
    max_bytes: U53
    v: Literal[1] = 1


class BlockData(msgspec.Struct, frozen=True, tag=15, tag_field="t", forbid_unknown_fields=True):
    keys: BlockHashes
    blocks: Annotated[list[Data], Meta(max_length=limits.MAX_FRAME_ROWS)]
    checksums: U32Column  # crc32 of each block
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        _check_blocks(self.keys, self.blocks, self.checksums)


class BlockPut(msgspec.Struct, frozen=True, tag=16, tag_field="t", forbid_unknown_fields=True):
    """Keep these blocks. Answered by BlockHasReply: 1 = kept or held already, 0 = refused (no room, bad checksum)."""

    keys: BlockHashes
    blocks: Annotated[list[Data], Meta(max_length=limits.MAX_FRAME_ROWS)]
    checksums: U32Column
    v: Literal[1] = 1

    def __post_init__(self) -> None:
        _check_blocks(self.keys, self.blocks, self.checksums)


def _check_blocks(keys: bytes, blocks: list[bytes], checksums: bytes) -> None:
    if not len(keys) == 16 * len(blocks) == 4 * len(checksums):
        raise ValueError("keys, blocks and checksums differ")


# ---- 11 operator → service (request / reply) ------------------------------------------------------------------------


class Control(msgspec.Struct, frozen=True, tag=17, tag_field="t", forbid_unknown_fields=True):
    """Ask one instance to do something, on `subjects.control(role, instance)`; answered by ControlReply.

    `drain` starts the drain that SIGTERM starts; `kv_snapshot` is answered by a KvEvents; `stats` answers with the
    service's counters; `policies` switches those of a scheduler that are named, by family, for one model or for all,
    and answers with what they are then.
    """

    verb: Literal["drain", "kv_snapshot", "stats", "policies"]
    policies: Annotated[dict[Name, Name], Meta(max_length=16)] = {}
    model: Name = ""
    v: Literal[1] = 1


class ControlReply(msgspec.Struct, frozen=True, tag=18, tag_field="t", forbid_unknown_fields=True):
    state: State
    stats: dict[Name, float] = {}
    policies: dict[Name, Name] = {}  # by family
    v: Literal[1] = 1


# ---- 12 gateway ↔ tokenizer: what a model is, and its tokenizer (request / reply) ------------------------------------


class ModelQuery(msgspec.Struct, frozen=True, tag=19, tag_field="t", forbid_unknown_fields=True):
    """On `subjects.model(model)`: answered by ModelCard."""

    model: Name
    v: Literal[1] = 1


class ModelCard(msgspec.Struct, frozen=True, tag=20, tag_field="t", forbid_unknown_fields=True):
    """What the edge must know of a model. `tokenizer_bytes` is the size of the zlib-packed tokenizer.json."""

    model: Name
    max_model_len: U53
    tokenizer_digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    tokenizer_bytes: U53
    created: Seconds
    default_sampling: SamplingParams  # from generation_config.json
    v: Literal[1] = 1


class TokenizerFetch(msgspec.Struct, frozen=True, tag=21, tag_field="t", forbid_unknown_fields=True):
    """On `subjects.model(model)`: a piece of the packed tokenizer.json; answered by TokenizerPiece."""

    model: Name
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    offset: U53
    v: Literal[1] = 1


class TokenizerPiece(msgspec.Struct, frozen=True, tag=22, tag_field="t", forbid_unknown_fields=True):
    offset: U53
    data: Data
    v: Literal[1] = 1


class TokenizeQuery(msgspec.Struct, frozen=True, tag=23, tag_field="t", forbid_unknown_fields=True):
    """For /tokenize, on `subjects.model(model)`: answered by TokenizeReply."""

    model: Name
    prompt: Prompt
    v: Literal[1] = 1


class TokenizeReply(msgspec.Struct, frozen=True, tag=24, tag_field="t", forbid_unknown_fields=True):
    token_ids: TokenIds
    max_model_len: U53
    v: Literal[1] = 1


class DetokenizeQuery(msgspec.Struct, frozen=True, tag=25, tag_field="t", forbid_unknown_fields=True):
    """For /detokenize, on `subjects.model(model)`: answered by DetokenizeReply."""

    model: Name
    token_ids: TokenIds
    v: Literal[1] = 1


class DetokenizeReply(msgspec.Struct, frozen=True, tag=26, tag_field="t", forbid_unknown_fields=True):
    text: Text
    v: Literal[1] = 1


class Refused(msgspec.Struct, frozen=True, tag=27, tag_field="t", forbid_unknown_fields=True):
    """The answer to bytes that could not be decoded, where they named a reply subject."""

    error: ErrorInfo
    v: Literal[1] = 1


Message = (
    GenerateRequest
    | TokenizedRequest
    | Assignment
    | Declined
    | TokenFrame
    | StreamEvent
    | Decisions
    | Claims
    | Cancel
    | WorkerStatus
    | Ended
    | KvEvents
    | Heartbeat
    | ScaleAdvice
    | BlockHas
    | BlockHasReply
    | BlockGet
    | BlockData
    | BlockPut
    | Control
    | ControlReply
    | ModelQuery
    | ModelCard
    | TokenizerFetch
    | TokenizerPiece
    | TokenizeQuery
    | TokenizeReply
    | DetokenizeQuery
    | DetokenizeReply
    | Refused
)

HEARTBEAT_INTERVAL_S: Final = 0.5
HEARTBEAT_TIMEOUT_S: Final = 1.5  # three missed
CLAIM_INTERVAL_S: Final = 0.5
CLAIM_LEASE_S: Final = 3.0
