"""What weights of few bits cost: `python -m lab.perplexity` prints the perplexity of a model for each way to load it.

Held-out tales are read in windows of 512 tokens, as `weft.demo_model.evaluate` reads them; perplexity is the
exponential of the mean loss of a token.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from weft import model_folder
from weft.hashing import BLOCK_SIZE
from weft.model_folder import BUNDLED, ModelFolder
from weft.settings import ModelSettings
from worker_svc.model_options import ModelOptions
from worker_svc.runner import Runner, load_runner
from worker_svc.step_input import StepInput

WINDOW: Final = 512


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to load a model."""

    dtype: str
    quantize: str = "none"

    def __str__(self) -> str:
        return self.dtype if self.quantize == "none" else f"{self.dtype}, {self.quantize}"


KINDS: Final = (
    Kind("float32"),
    Kind("bfloat16"),
    *(Kind("float32", quantize) for quantize in ("int8", "fp8", "int4")),
)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="lab.perplexity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tales-6m", help="model folder or bundled model; with tokenizer.json")
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    folder = model_folder.read(ModelSettings(model=arguments.model))
    windows = read_windows(folder, arguments.text.read_text("utf-8"))
    num_tokens = sum(len(window) - 1 for window in windows)
    sys.stdout.write(f"{folder.name}, {num_tokens} tokens of {arguments.text.name}\n")
    first = math.nan
    for kind in KINDS:
        value = perplexity(load(folder, kind, arguments.device, arguments.threads), windows)
        first = value if math.isnan(first) else first
        sys.stdout.write(f"{kind!s:20} {value:8.3f} {value / first - 1:+8.2%}\n")
        sys.stdout.flush()


def load(folder: ModelFolder, kind: Kind, device: str = "cpu", threads: int = 1) -> Runner:
    """A runner with room for one window."""
    options = ModelOptions(device, kind.dtype, quantize=kind.quantize, threads=threads, kv_memory=64 * 2**20)
    return load_runner(folder, options)


def read_windows(folder: ModelFolder, text: str) -> list[list[int]]:
    """Token ids of each tale, in windows that overlap by one.

    A tale ends with the last of the model's end tokens: the first is that of a turn in a conversation.
    """
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    tales = [tokenizer.encode(tale).ids + list(folder.eos_token_ids[-1:]) for tale in text.strip().split("\n\n\n")]
    return [window for tale in tales for window in _windows(tale)]


@torch.inference_mode()
def perplexity(runner: Runner, windows: Sequence[Sequence[int]]) -> float:
    """Of all tokens but each window's first."""
    losses = [_losses(runner, window) for window in windows]
    return math.exp(torch.cat(losses).double().mean().item())


def _windows(token_ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(token_ids) - 1, WINDOW):
        yield token_ids[start : start + WINDOW + 1]


def _losses(runner: Runner, window: Sequence[int]) -> torch.Tensor:
    """Of each token after the first: [len(window) - 1]."""
    rows = list(range(len(window) - 1))
    blocks = list(range(-(-len(rows) // BLOCK_SIZE)))
    step = StepInput(list(window[:-1]), rows, rows, [len(rows)], [len(rows)], [blocks], rows)
    logits = runner.forward(step)
    return F.cross_entropy(logits, torch.tensor(window[1:], device=logits.device), reduction="none").cpu()


if __name__ == "__main__":
    main()
