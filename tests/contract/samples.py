"""One message of every type, with every field set: the material of the golden vectors."""

from __future__ import annotations

from weft import messages as m
from weft.columns import pack_f32, pack_u32

HASH_A = bytes(range(16))
HASH_B = bytes(range(16, 32))
ERROR = m.ErrorInfo("overloaded", "the backlog is full", param="messages", retry_after_s=2.5)
SAMPLING = m.SamplingParams(
    max_tokens=64,
    min_tokens=2,
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.1,
    logit_bias={17: -100.0},
    stop_token_ids=(2, 3),
    ignore_eos=True,
    logprobs=5,
)
CHOICES = [m.Choice(slot=7, seed=2**64 - 1, emitted=pack_u32([5, 6])), m.Choice(slot=8, seed=1)]
TOKENIZED = m.TokenizedRequest(
    request_id="r1",
    epoch=2,
    gateway="g1",
    model="tales-6m",
    prompt_token_ids=pack_u32([1, 2, 3]),
    block_hashes=HASH_A,
    sampling=SAMPLING,
    choices=CHOICES,
    cache_salt="alice",
    tenant="ann",
    priority=-3,
    slo_class="flex",
    yield_epoch=1,
    stamps={"gateway": 1.5, "tokenizer": 1.75},
)
CHAT = m.ChatPrompt([m.ChatMessage("user", "Tell me a tale", "ann")], add_generation_prompt=True, now=1.5)

DECISION = m.Decision(
    worker="w2",
    policy="prefix_aware",
    rule="longest match",
    num_candidates=4,
    least_load=1,
    num_prompt_blocks=14,
    scores=(m.Score("w2", 3, 100, 12), m.Score("w1", 1, 0, 0)),
    expected_ttft_s=0.25,
    stop_after=1,
)


def _generate(prompt: m.Prompt) -> m.GenerateRequest:
    return m.GenerateRequest(
        "r1", 2, "g1", "tales-6m", prompt, SAMPLING, CHOICES, "alice", "ann", -3, "flex", 1, {"gateway": 1.5}
    )


SAMPLES: dict[str, m.Message] = {
    "GenerateRequest/chat": _generate(CHAT),
    "GenerateRequest/text": _generate(m.TextPrompt("Once upon a time", add_special_tokens=False)),
    "GenerateRequest/tokens": _generate(m.TokenPrompt(pack_u32([1, 2, 3]))),
    "TokenizedRequest": TOKENIZED,
    "Assignment": m.Assignment(TOKENIZED, "s1", 256),
    "Declined": m.Declined(TOKENIZED, "w1"),
    "TokenFrame": m.TokenFrame(
        worker="w1",
        worker_epoch=3,
        sequence=4,
        slots=pack_u32([7, 8]),
        epochs=pack_u32([2, 2]),
        first_indices=pack_u32([2, 0]),
        counts=bytes([2, 0]),
        finishes=bytes([m.FINISH_NONE, m.FINISH_ERROR]),
        token_ids=pack_u32([9, 10]),
        logprobs=[m.RowLogprobs(0, 1, pack_f32([-0.5, -1.5]), pack_u32([9, 11]), pack_f32([-0.5, -1.0]))],
        errors={1: ERROR},
    ),
    "StreamEvent": m.StreamEvent("r1", 2, "rejected", "scheduler", "s1", ERROR, 3, 1, {"scheduler": 2.0}),
    "StreamEvent/queued": m.StreamEvent(
        "r1", 2, "queued", "scheduler", "s1", place=m.BacklogPlace(5, 4, "bounded", "fcfs")
    ),
    "StreamEvent/prefill": m.StreamEvent("r1", 2, "prefill", "worker", "w1", num_chunks=8, num_computed_tokens=2048),
    "Decisions": m.Decisions("s1", [m.Placed("r1", 2, 230, {"scheduler": 2.0}, DECISION)]),
    "Claims": m.Claims("worker", "w1", ["r1"], pack_u32([2])),
    "Cancel": m.Cancel("r1", 2, "g1", pack_u32([7]), pack_u32([31])),
    "Cancel/all": m.Cancel("r1", 2, "g1"),
    "WorkerStatus": m.WorkerStatus(
        "w1", 3, "tales-6m", "ready", 64, 5, 2, 900, 1000, 800, {"s1": 12}, 4, 5000.0, 300.0, "decode", 0.03, 0.002
    ),
    "Ended": m.Ended("w1", "tales-6m", ["r1"], ["ann"], pack_u32([3]), pack_u32([64])),
    "KvEvents": m.KvEvents("w1", 3, 4, HASH_A, HASH_B, True),
    "Heartbeat": m.Heartbeat("worker", "w1", 3, "ready", ["tales-6m"]),
    "ScaleAdvice": m.ScaleAdvice("s1", "tales-6m", 3, 900, 120, 2, "3 wait", ["w2", "w1"]),
    "BlockHas": m.BlockHas(HASH_A + HASH_B),
    "BlockHasReply": m.BlockHasReply(bytes([1, 0])),
    "BlockGet": m.BlockGet(HASH_A, 2**20),
    "BlockData": m.BlockData(HASH_A, [b"kv"], pack_u32([123])),
    "BlockPut": m.BlockPut(HASH_A, [b"kv"], pack_u32([123])),
    "Control": m.Control("policies", {"order": "srpt"}, "tales-6m"),
    "ControlReply": m.ControlReply("ready", {"running": 1.0}, {"order": "srpt"}),
    "ModelQuery": m.ModelQuery("tales-6m"),
    "ModelCard": m.ModelCard("tales-6m", 2048, HASH_A, 70_000, 1.5, SAMPLING),
    "TokenizerFetch": m.TokenizerFetch("tales-6m", HASH_A, 512),
    "TokenizerPiece": m.TokenizerPiece(512, b"piece"),
    "TokenizeQuery": m.TokenizeQuery("tales-6m", CHAT),
    "TokenizeReply": m.TokenizeReply(pack_u32([1, 2]), 2048),
    "DetokenizeQuery": m.DetokenizeQuery("tales-6m", pack_u32([1, 2])),
    "DetokenizeReply": m.DetokenizeReply("Once"),
    "Refused": m.Refused(ERROR),
}
