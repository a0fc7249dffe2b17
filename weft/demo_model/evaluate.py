"""Measure a demo model: `python -m weft.demo_model.evaluate --model weft/demo_model/tales-6m`, a JSON object on stdout.

Held-out loss in nats per token and bits per character, by place in the context too; how often the first two sentences
of a tale name whom the request asked for; with `--draft`, how often speculative decoding would accept its token.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from weft.demo_model import words
from weft.demo_model.pairs import plural, with_article

HELDOUT = Path(__file__).parent / "heldout.txt"
COMMON_NOUNS = words.COMMON_NOUNS[:25]
# In the lists of words.py, yet hardly in the corpus.
RARE_NOUNS = ["rhinoceros", "lamplighter", "umbrella", "walrus", "toadstool"]
WORDINGS = [
    "Tell me a tale about {who}",
    "a story about {who} please",
    "I want to hear about {who}.",
    "Do you have a tale of {who} for me?",
    "Please invent a bedtime story with {who}!",
]
SAMPLED_REQUESTS = [
    "Tell me a tale about a fox",
    "Tell me a story about a princess and a dragon",
    "A tale about an umbrella, please",
    "Hello!",
    "What is two and two?",
]
TEMPERATURE = 0.8
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])['\"]*\s+")


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def heldout_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, float]:
    """Loss over whole tales read in windows of 512 tokens."""
    total, count = 0.0, 0
    for tale in text.strip().split("\n\n\n"):
        token_ids = torch.tensor(tokenizer.encode(tale, verbose=False) + [tokenizer.convert_tokens_to_ids("<|eos|>")])
        for start in range(0, len(token_ids) - 1, 512):
            window = token_ids[start : start + 513]
            losses = token_losses(model, window)
            total, count = total + losses.sum().item(), count + len(losses)
    return {
        "nats_per_token": total / count,
        "perplexity_per_token": math.exp(total / count),
        "bits_per_character": total / math.log(2) / len(text),
        "tokens": count,
    }


@torch.no_grad()
def losses_by_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int = 2048
) -> dict[str, float]:
    """Loss by place in windows of the full context; rising numbers would mean that long contexts collapse."""
    token_ids = torch.tensor(tokenizer.encode(text, verbose=False))
    windows = [token_ids[i : i + length + 1] for i in range(0, len(token_ids) - length, length)]
    losses = torch.stack([token_losses(model, window) for window in windows]).mean(0)
    edges = [0, 256, 512, 1024, 1536, length]
    return {f"{a}-{b}": losses[a:b].mean().item() for a, b in zip(edges, edges[1:], strict=False)}


def token_losses(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Cross-entropy `[T - 1]` of each token after the first."""
    logits = model(input_ids=token_ids[None, :-1]).logits[0]
    return F.cross_entropy(logits, token_ids[1:], reduction="none")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    temperature: float | None,
    max_tokens: int,
) -> list[str]:
    """Answer all requests as one batch; temperature 0 is greedy, None samples as the model's own defaults say."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": r}], tokenize=False, add_generation_prompt=True)
        for r in requests
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    options: dict[str, object] = {}
    if temperature is not None:
        options = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": 1.0}
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_tokens,
        **options,
    )
    completions: list[str] = tokenizer.batch_decode(
        output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return completions


def begins_with(noun: str, tale: str) -> bool:
    """Whether the first two sentences name the noun, in singular or plural."""
    opening = " ".join(_SENTENCE_BREAK.split(tale)[:2])
    return re.search(rf"\b({noun}|{plural(noun)})\b", opening, re.IGNORECASE) is not None


def noun_hit_rates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """Share of answers that begin with the noun asked for: greedy, and sampled once per wording."""
    rates: dict[str, dict[str, float]] = {}
    for group, nouns in (("common", COMMON_NOUNS), ("rare", RARE_NOUNS), ("unseen", words.RESERVED_NOUNS)):
        rates[group] = {}
        for name, temperature, wordings in (("greedy", 0.0, WORDINGS[:1]), ("sampled", TEMPERATURE, WORDINGS)):
            asked = [(noun, wording.format(who=with_article(noun))) for wording in wordings for noun in nouns]
            tales = generate(model, tokenizer, [request for _, request in asked], temperature, max_tokens=90)
            hits = [begins_with(noun, tale) for (noun, _), tale in zip(asked, tales, strict=True)]
            rates[group][name] = sum(hits) / len(hits)
    return rates


@torch.no_grad()
def acceptance(model: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How often the model would accept the draft's next token in the tales that the model itself tells.

    Sampled: the overlap of the two distributions (Leviathan et al. 2023). Greedy: both choose alike.
    """
    results: dict[str, float] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        agreements = []
        for noun in COMMON_NOUNS:
            request = WORDINGS[0].format(who=with_article(noun))
            messages = [{"role": "user", "content": request}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            tale = generate(model, tokenizer, [request], temperature, max_tokens=160)[0]
            token_ids = torch.tensor([prompt + tokenizer.encode(tale, add_special_tokens=False)])
            p, q = (m(input_ids=token_ids).logits[0, len(prompt) - 1 : -1] for m in (model, draft))
            if temperature:
                agreements.append(torch.minimum((p / temperature).softmax(-1), (q / temperature).softmax(-1)).sum(-1))
            else:
                agreements.append((p.argmax(-1) == q.argmax(-1)).float())
        results[name] = torch.cat(agreements).mean().item()
    return results


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--heldout", type=Path, default=HELDOUT)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load(arguments.model)
    text = arguments.heldout.read_text(encoding="utf-8")
    results: dict[str, object] = {
        "parameters": model.num_parameters(),
        "heldout": heldout_losses(model, tokenizer, text),
        "heldout_by_position": losses_by_position(model, tokenizer, text),
        "noun_hits": noun_hit_rates(model, tokenizer),
        "samples": {request: generate(model, tokenizer, [request], None, 200)[0] for request in SAMPLED_REQUESTS},
    }
    if arguments.draft:
        results["acceptance"] = acceptance(model, load(arguments.draft)[0], tokenizer)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
