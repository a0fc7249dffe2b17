"""Engines with and without drafts on the same texts, a step of one and a step of the other in turn.

Both have one model's weights, so that neither finds the processor's caches full of the other's. Where a text is given,
as for output that copies its prompt, sampled tokens are replaced by the text's: all else is computed as ever.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Final

import torch
from tokenizers import Tokenizer

from lab.engine.models import SMALL, folder
from lab.report import Figure, median_figure, say
from weft import model_folder
from weft.columns import pack_u32
from weft.hashing import block_hashes, chain_root
from weft.messages import Choice, SamplingParams, TokenizedRequest
from weft.model_folder import BUNDLED, ModelFolder
from weft.settings import MeshSettings, ModelSettings, WorkerSettings
from worker_svc.engine import Engine
from worker_svc.engine_io import Add
from worker_svc.engine_models import load_draft
from worker_svc.model_options import ModelOptions
from worker_svc.runner import Runner, load_runner
from worker_svc.sampler import Drafts, Sampler, Sampling
from worker_svc.sequence import Sequence
from worker_svc.torch_engine import make_small_runner, make_speculation

ROUNDS: Final = 4
NUM_TOKENS: Final = 250
MAX_LENGTH: Final = 8
ROOT: Final = chain_root(b"")
NOUNS: Final = (
    "fox",
    "king",
    "witch",
    "miller",
    "princess",
    "wolf",
    "giant",
    "tailor",
    "dragon",
    "soldier",
    "cat",
    "queen",
)
CHAT: Final = "<|bos|><|system|>You are a storyteller.<|end|><|user|>Tell me a tale about a {}<|end|><|assistant|>"

Text = list[int]


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts that are answered together, and what the answers are; None for what the model says itself."""

    prompts: list[Text]
    texts: list[Text] | None
    sampling: SamplingParams


class Scripted(Sampler):
    """Samples, and then says what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[Text] | None = None  # by slot

    def sample(self, logits: torch.Tensor, sequences: list[Sequence], drafts: Drafts | None = None) -> Sampling:
        sampling = super().sample(logits, sequences, drafts)
        if self.texts is None:
            return sampling
        lengths = [0] * len(sequences) if drafts is None else [len(draft) for draft in drafts]
        said = [
            self.texts[sequence.slot][min(sequence.num_output_tokens + i, NUM_TOKENS - 1)]
            for sequence, length in zip(sequences, lengths, strict=True)
            for i in range(length + 1)
        ]
        return replace(sampling, token_ids=torch.tensor(said))


class Bench:
    """A model, and an engine for each kind of speculation."""

    def __init__(self, model: ModelFolder, kinds: Ordered[str]) -> None:
        self._settings = WorkerSettings(MeshSettings(), ModelSettings(), kv_offload="never")
        runner = load_runner(model, ModelOptions("cpu", "float32", kv_memory=2**28))
        self._samplers = {kind: Scripted() for kind in kinds}
        self._engines = {kind: self._make_engine(kind, model, runner) for kind in kinds}
        self._model = model
        self._num_requests = 0

    def race(self, name: str, jobs: list[Job], bars: dict[str, float]) -> list[Figure]:
        """How many times as fast as without drafts each job is done."""
        gains: dict[str, list[float]] = {kind: [] for kind in self._engines if kind != "none"}
        for job in jobs:
            seconds, said = self._run(job)
            assert all(texts == said["none"] for texts in said.values()), "the text is not that of plain decoding"
            for kind, ratios in gains.items():
                ratios.append(seconds["none"] / seconds[kind])
        figures = [
            median_figure(f"{kind}: {name}", ratios, "x", bar=bars.get(kind), side="least")
            for kind, ratios in gains.items()
        ]
        for figure in figures:
            say(f"  {figure.line()}")
        return figures

    def _run(self, job: Job) -> tuple[dict[str, float], dict[str, dict[int, Text]]]:
        """Seconds and tokens of each engine."""
        seconds = dict.fromkeys(self._engines, 0.0)
        said: dict[str, dict[int, Text]] = {kind: {} for kind in self._engines}
        for kind, engine in self._engines.items():
            self._samplers[kind].texts = job.texts
            self._ask(engine, job)
        while busy := [kind for kind, engine in self._engines.items() if engine.has_work]:
            for kind in random.sample(busy, len(busy)):
                started = time.perf_counter()
                output = self._engines[kind].step()
                seconds[kind] += time.perf_counter() - started
                for row in output.rows if output is not None else ():
                    said[kind].setdefault(row.slot, []).extend(row.token_ids)
        return seconds, said

    def _ask(self, engine: Engine, job: Job) -> None:
        for slot, prompt in enumerate(job.prompts):
            self._num_requests += 1
            engine.apply(
                Add(
                    TokenizedRequest(
                        f"r{self._num_requests}",
                        0,
                        "lab",
                        self._model.name,
                        pack_u32(prompt),
                        b"".join(block_hashes(ROOT, pack_u32(prompt))),
                        job.sampling,
                        [Choice(slot=slot, seed=slot)],
                    )
                )
            )

    def _make_engine(self, kind: str, model: ModelFolder, runner: Runner) -> Engine:
        """An engine on the model's weights, with KV blocks of its own."""
        own = copy.copy(runner)
        own.resize(runner.num_blocks)
        settings = replace(self._settings, speculation=kind, speculation_tokens=MAX_LENGTH)
        drafter = make_small_runner(load_draft(model, settings), settings) if kind == "draft" else None
        if drafter is not None:
            drafter.resize(runner.num_blocks)
        return Engine(
            own,
            settings,
            digest=b"",
            eos_token_ids=(),
            sampler=self._samplers[kind],
            speculation=make_speculation(settings, drafter, self._samplers[kind], overlaps=False),
        )


def speculation() -> list[Figure]:
    """Drafts on texts that copy, that half copy, that do not, and that the demo model itself tells."""
    figures: list[Figure] = []
    bench = Bench(_read("tales-6m"), ["none", "ngram", "draft"])
    tales, chats = _tales(), _chats()
    bars = {"ngram": 0.97}
    figures += bench.race("copies its prompt", [_copy(tales, i) for i in range(ROUNDS)], {"ngram": 1.5})
    figures += bench.race("copies half of it", [_edit(tales, i) for i in range(ROUNDS)], bars)
    figures += bench.race("says something else", [_other(tales, i, 1) for i in range(ROUNDS)], bars)
    figures += bench.race("16 that say something else", [_other(tales, i, 16) for i in range(ROUNDS)], bars)
    for temperature in (0.0, 0.7, 1.0):
        jobs = [_tell([chats[i]], temperature) for i in range(ROUNDS)]
        figures += bench.race(f"own text at temperature {temperature:g}", jobs, {"ngram": 0.97, "draft": 1.2})
    jobs = [_tell(chats[:8], 0.7) for _ in range(ROUNDS)]
    figures += bench.race("8 of its own texts at temperature 0.7", jobs, bars)
    with folder(SMALL) as path:
        model = model_folder.read(ModelSettings(model=str(path), load_format="dummy"))
        bench = Bench(model, ["none", "ngram"])
        figures += bench.race("small: copies its prompt", [_copy(_noise(), i) for i in range(2)], {"ngram": 1.5})
        figures += bench.race("small: says something else", [_other(_noise(), i, 1) for i in range(2)], bars)
    return figures


def _read(name: str) -> ModelFolder:
    return model_folder.read(ModelSettings(model=name))


def _tales() -> Text:
    """Text that the demo model has not seen, as tokens."""
    return _tokenizer().encode((BUNDLED / "heldout.txt").read_text(), add_special_tokens=False).ids


def _chats() -> list[Text]:
    return [_tokenizer().encode(CHAT.format(noun), add_special_tokens=False).ids for noun in NOUNS]


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tales-6m" / "tokenizer.json"))


def _noise() -> Text:
    source = random.Random(5)
    return [source.randrange(3, SMALL.vocab_size) for _ in range(8000)]


def _given(prompts: list[Text], texts: list[Text]) -> Job:
    return Job(prompts, texts, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True))


def _copy(tales: Text, number: int) -> Job:
    prompt = tales[500 * number : 500 * number + 300]
    return _given([prompt], [prompt[:NUM_TOKENS]])


def _edit(tales: Text, number: int) -> Job:
    """Pieces of the prompt, and as long ones of another text between them."""
    prompt, other = tales[500 * number : 500 * number + 300], cycle(tales[-500 * number - 500 :])
    pieces = [[*prompt[start : start + 30], *islice(other, 30)] for start in range(0, NUM_TOKENS, 60)]
    return _given([prompt], [[token_id for piece in pieces for token_id in piece][:NUM_TOKENS]])


def _other(tales: Text, number: int, count: int) -> Job:
    starts = [(700 * (number + 5 * i)) % (len(tales) - 700) for i in range(count)]
    return _given(
        [tales[start : start + 300] for start in starts],
        [tales[start + 300 : start + 300 + NUM_TOKENS] for start in starts],
    )


def _tell(prompts: list[Text], temperature: float) -> Job:
    top_p = 0.95 if 0 < temperature < 1 else 1.0
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, top_p=top_p, ignore_eos=True)
    return Job(prompts, None, sampling)
