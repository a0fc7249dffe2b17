"""Train a demo model: `python -m weft.demo_model.train --corpus ../shared/corpus/fairy_tales.txt.xz --size 6m ...`.

One run goes from random weights to the exported Hugging Face folder. Its schedule follows the clock, not the steps:
`--minutes` is the budget, and learning rate, sequence length and share of chats are functions of the part of it that is
spent, so a run on a busy machine still ends on time, only with fewer tokens. A stopped run resumes from the checkpoint
in `--run`. With `--teacher` the model learns the teacher's next-token distribution instead of the text, which makes a
draft that agrees with its target.

On Linux, `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` in the environment spares the page
faults of large temporary tensors: 5,800 instead of 4,500 tokens/s on 2 cores of an AMD EPYC with AVX512-BF16 (2026).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from weft.demo_model.corpus import load_tales, split_heldout
from weft.demo_model.data import IGNORED, Batch, Document, TokenStream, encode_chats, encode_tales, next_batch
from weft.demo_model.pairs import ChatMaker
from weft.demo_model.tokenizer import (
    BOS,
    END,
    EOS,
    MAX_POSITION_EMBEDDINGS,
    PAD,
    VOCAB_SIZE,
    save_tokenizer,
    token_id,
    train_tokenizer,
)

HELDOUT_CHARS = 100_000
CHATS_PER_EPOCH = 4_000
TOKENS_PER_STEP = 8_192
LOG_EVERY_STEPS = 10
EVALUATE_EVERY_STEPS = 100
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Size:
    """The dimensions in which the two models differ."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


SIZES = {"6m": Size(256, 704, 6, 8, 4), "1m": Size(128, 352, 3, 4, 2)}


@dataclass(slots=True)
class Progress:
    """What a checkpoint counts; `elapsed_s` is training time over all resumed parts of the run."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0


class Trainer:
    """A model, its optimisers, its data and the clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run_folder: Path = arguments.run
        self.run_folder.mkdir(parents=True, exist_ok=True)
        tales, heldout = split_heldout(load_tales(arguments.corpus), HELDOUT_CHARS)
        if arguments.heldout:
            arguments.heldout.write_text("\n\n\n".join(tale.text for tale in heldout) + "\n", encoding="utf-8")
        self.tokenizer = train_tokenizer(tale.text for tale in tales)
        self.heldout = encode_tales(self.tokenizer, heldout)
        torch.manual_seed(0)
        self.model = build_model(SIZES[arguments.size], self.tokenizer)
        self.teacher = LlamaForCausalLM.from_pretrained(arguments.teacher) if arguments.teacher else None
        self.optimizers = build_optimizers(self.model)
        self.progress = Progress()
        self._load_checkpoint()
        # A resumed run starts new epochs rather than store its place in the old ones.
        self.rng = Random(self.progress.step)
        self.tales = TokenStream(lambda _: encode_tales(self.tokenizer, tales), self.rng)
        chat_maker = ChatMaker(tales)
        self.chats = TokenStream(
            lambda rng: encode_chats(self.tokenizer, chat_maker.make(rng, CHATS_PER_EPOCH)), self.rng
        )

    def train(self) -> None:
        """Run until the time budget is spent, then export."""
        last_checkpoint_s = self.progress.elapsed_s
        recent: list[dict[str, float]] = []
        while (spent := self.progress.elapsed_s / (60 * self.arguments.minutes)) < 1:
            started = time.monotonic()
            recent.append(self._step(spent))
            self.progress.elapsed_s += time.monotonic() - started
            if self.progress.step % LOG_EVERY_STEPS == 0:
                self._log(spent, mean_by_name(recent))
                recent.clear()
            if self.progress.elapsed_s - last_checkpoint_s > 60 * self.arguments.checkpoint_minutes:
                self._save_checkpoint()
                last_checkpoint_s = self.progress.elapsed_s
        self._log(1.0, mean_by_name(recent) | {"heldout": heldout_loss(self.model, self.heldout)})
        self._save_checkpoint()

    def _step(self, spent: float) -> dict[str, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * learning_rate_factor(spent)
        seq_len = choose_seq_len(spent, self.rng)
        num_rows = TOKENS_PER_STEP // seq_len
        num_chat_rows = int(num_rows * chat_share(spent) + self.rng.random())
        batch = next_batch(self.tales, self.chats, num_rows, num_chat_rows, seq_len)
        loss, parts = batch_loss(self.model, self.teacher, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.num_tokens += num_rows * seq_len
        return parts

    def _log(self, spent: float, losses: dict[str, float]) -> None:
        progress = self.progress
        if progress.step % EVALUATE_EVERY_STEPS == 0:
            losses = losses | {"heldout": heldout_loss(self.model, self.heldout)}
        record = {
            "step": progress.step,
            "tokens": progress.num_tokens,
            "seconds": round(progress.elapsed_s, 1),
            "lr_factor": round(learning_rate_factor(spent), 4),
            **{name: round(loss, 4) for name, loss in losses.items()},
        }
        line = json.dumps(record)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        with (self.run_folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": [self.progress.step, self.progress.num_tokens, self.progress.elapsed_s],
        }
        partial = self.run_folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.run_folder / "checkpoint.pt")
        export(self.model, self.tokenizer, self.arguments.out)

    def _load_checkpoint(self) -> None:
        path = self.run_folder / "checkpoint.pt"
        if path.exists():
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.progress = Progress(*state["progress"])


def mean_by_name(records: list[dict[str, float]]) -> dict[str, float]:
    """Average the values of each name over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: fmean(record[name] for record in records if name in record) for name in names}


def learning_rate_factor(spent: float) -> float:
    """Warm up over 1% of the budget, hold until 60%, then fall linearly to zero."""
    return min(1.0, spent / 0.01 + 0.02, (1.0 - spent) / 0.4)


def choose_seq_len(spent: float, rng: Random) -> int:
    """Short sequences first, which are cheaper; full contexts among them at the end."""
    if spent < 0.45:
        return 256
    if spent < 0.75:
        return 512
    return rng.choices([512, 1024, MAX_POSITION_EMBEDDINGS], weights=[6, 2, 2])[0]


def chat_share(spent: float) -> float:
    """The share of rows that are chats: none while the language is learned, most at the end."""
    if spent < 0.4:
        return 0.0
    return 0.4 if spent < 0.85 else 0.6


def build_model(size: Size, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Make the model with random weights."""
    eos_token_ids = [token_id(tokenizer, END), token_id(tokenizer, EOS)]
    special = {
        "bos_token_id": token_id(tokenizer, BOS),
        "eos_token_id": eos_token_ids,
        "pad_token_id": token_id(tokenizer, PAD),
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.95, **special)
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_loss(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Return what to minimise, and the mean cross-entropy of the tale rows and of the chat rows for the log."""
    token_ids = torch.from_numpy(batch.token_ids)
    labels = torch.from_numpy(batch.labels)
    logits = forward(model, token_ids)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    is_learned = labels.flatten() != IGNORED
    is_chat = torch.from_numpy(batch.is_chat).repeat_interleave(labels.shape[1])
    parts = {}
    for name, chosen in (("tales", is_learned & ~is_chat), ("chats", is_learned & is_chat)):
        if chosen.any():
            parts[name] = losses.detach()[chosen].mean().item()
    if teacher is None:
        return losses.sum() / is_learned.sum(), parts
    with torch.no_grad():
        target = forward(teacher, token_ids).log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum") / labels.numel()
    return divergence, parts | {"divergence": divergence.item()}


def forward(model: LlamaForCausalLM, token_ids: Tensor) -> Tensor:
    """Return float32 logits `[B, T, V]`, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, documents: list[Document], seq_len: int = 512) -> float:
    """Mean cross-entropy in nats per token over whole documents, cut into windows of `seq_len`."""
    total, count = 0.0, 0
    for document in documents:
        for start in range(0, len(document.token_ids) - 1, seq_len):
            window = torch.from_numpy(document.token_ids[start : start + seq_len + 1])
            logits = forward(model, window[None, :-1])
            total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            count += len(window) - 1
    return total / count


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder in float16, each file whole at any moment."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.half()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        half.save_pretrained(name)
        save_tokenizer(tokenizer, Path(name))
        for path in Path(name).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="fairy_tales.txt or .txt.xz")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, required=True, help="time budget of the whole run")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--teacher", type=Path, help="model folder to distil from")
    parser.add_argument("--heldout", type=Path, help="text file to write the held-out tales to")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    Trainer(arguments).train()


if __name__ == "__main__":
    main()
