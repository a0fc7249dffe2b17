"""Whole steps of a model on a GPU, and the engine beside `transformers`: Llama-3-8B's shape, made-up weights."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from lab.gpu.clock import Ceilings
from lab.report import Figure
from weft import model_folder
from weft.columns import pack_u32
from weft.hashing import BLOCK_SIZE
from weft.messages import Choice, SamplingParams, TokenizedRequest
from weft.settings import WorkerSettings, load
from worker_svc.backends.cuda_graphs import MIN_USES, STEPS_BETWEEN
from worker_svc.engine_io import Add
from worker_svc.model_options import ModelOptions
from worker_svc.runner import Runner, load_runner
from worker_svc.step_input import StepInput
from worker_svc.torch_engine import load_engine

LLAMA_3_8B: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# Weights that a step reads: all but the embedding, of which it reads a row a token.
_LAYER: Final = 4096 * (6144 + 4096 + 3 * 14336)
WEIGHTS: Final = 32 * _LAYER + 128256 * 4096
KV_TOKEN_BYTES: Final = 32 * 2 * 8 * 128 * 2
CONCURRENT, PROMPT, OUTPUT = 64, 512, 128


def folder() -> Path:
    """A folder with nothing but a config."""
    path = Path(tempfile.mkdtemp(prefix="weft-8b-"))
    (path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return path


def step_figures(ceilings: Ceilings) -> list[Figure]:
    """Decode and prefill steps against their floors, and int4 against bfloat16."""
    path = folder()
    runner = _runner(path)
    one = _decode_seconds(runner, 1, 128)
    many = _decode_seconds(runner, 64, 1024)
    prefill = _prefill_seconds(runner, 8192)
    del runner
    torch.cuda.empty_cache()
    quantized = _decode_seconds(_runner(path, quantize="int4"), 1, 128)
    floor_one = 2 * WEIGHTS / ceilings.bytes_per_s
    floor_many = (2 * WEIGHTS + 64 * 1024 * KV_TOKEN_BYTES) / ceilings.bytes_per_s
    operations = 2 * 32 * _LAYER * 8192 + 32 * 4 * 32 * 128 * 8192 * 8193 // 2 + 2 * 128256 * 4096
    floor_prefill = operations / ceilings.operations_per_s
    return [
        _share("decode, batch 1", floor_one, one, 0.85),
        _share("decode, batch 64 at 1k context", floor_many, many, 0.80),
        _share("prefill of 8k tokens", floor_prefill, prefill, 0.65),
        Figure(
            "decode, batch 1, int4 against bfloat16",
            one / quantized,
            "x",
            bar=2.5,
            side="least",
            note=f"{1000 * quantized:.3g} and {1000 * one:.3g} ms",
        ),
    ]


def _share(name: str, floor: float, seconds: float, bar: float) -> Figure:
    return Figure(
        f"{name}: share of the floor",
        floor / seconds,
        "",
        bar=bar,
        side="least",
        note=f"{1000 * seconds:.4g} ms, floor {1000 * floor:.4g} ms",
    )


def _runner(path: Path, **options: Any) -> Runner:
    settings = load(WorkerSettings, ["--model", str(path), "--load-format", "dummy"], {})
    chosen = ModelOptions(device="cuda", dtype="bfloat16", kv_memory=2**34, **options)
    return load_runner(model_folder.read(settings.model), chosen)


def _decode_seconds(runner: Runner, batch: int, context: int) -> float:
    """Of one decode step as the engine runs it, by its graph."""
    step = _decodes(batch, context)
    for _ in range(MIN_USES + STEPS_BETWEEN + 1):
        runner.forward(step)
    return _seconds_of_steps(lambda: runner.forward(step))


def _prefill_seconds(runner: Runner, num_tokens: int) -> float:
    rows = list(range(num_tokens))
    tokens = torch.randint(0, 128000, (num_tokens,)).tolist()
    tables = [list(range(-(-num_tokens // BLOCK_SIZE)))]
    step = StepInput(tokens, rows, rows, [num_tokens], [num_tokens], tables, [num_tokens - 1])
    runner.forward(step)
    return _seconds_of_steps(lambda: runner.forward(step), count=5)


def _seconds_of_steps(call: Callable[[], object], count: int = 50) -> float:
    """Wall time of a step, the host's part included, with the device never waiting for more than one."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def _decodes(batch: int, context: int) -> StepInput:
    blocks = -(-context // BLOCK_SIZE)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(batch)]
    slots = [table[-1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE for table in tables]
    tokens = torch.randint(0, 128000, (batch,)).tolist()
    return StepInput(tokens, [context - 1] * batch, slots, [1] * batch, [context] * batch, tables, list(range(batch)))


def serving_figures() -> list[Figure]:
    """Output tokens a second of 64 requests at once: our engine, and `transformers` continuous batching."""
    path = folder()
    ours = _engine_tokens_per_s(path)
    torch.cuda.empty_cache()
    theirs = _transformers_tokens_per_s()
    note = f"{ours:.4g} and {theirs:.4g} tokens/s"
    name = f"{CONCURRENT} requests of {PROMPT} + {OUTPUT} tokens against transformers continuous batching"
    return [Figure(name, ours / theirs, "x", bar=3.0, side="least", note=note)]


def _engine_tokens_per_s(path: Path) -> float:
    flags = ["--model", str(path), "--load-format", "dummy", "--device", "cuda", "--dtype", "bfloat16"]
    settings = load(
        WorkerSettings,
        [*flags, "--kv-memory", "60%", "--max-num-batched-tokens", "8192", "--prefix-cache", "false"],
        {},
    )
    engine = load_engine(model_folder.read(settings.model), settings)
    _serve(engine, "warm")
    began = time.perf_counter()
    _serve(engine, "timed")
    return CONCURRENT * OUTPUT / (time.perf_counter() - began)


def _serve(engine: Any, name: str) -> None:
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    for i in range(CONCURRENT):
        prompt = pack_u32(torch.randint(0, 128000, (PROMPT,)).tolist())
        choices = [Choice(slot=i, seed=i)]
        engine.apply(Add(TokenizedRequest(f"{name}{i}", 0, "lab", "m", prompt, b"", sampling, choices)))
    while engine.has_work:
        engine.step()


def _transformers_tokens_per_s() -> float:
    # Heavy, and only here.
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    config = LlamaConfig(**{name: value for name, value in LLAMA_3_8B.items() if name != "architectures"})
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    generation = GenerationConfig(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [torch.randint(0, 128000, (PROMPT,)).tolist() for _ in range(CONCURRENT)]
    model.generate_batch(prompts[:2], generation_config=generation)
    torch.cuda.synchronize()
    began = time.perf_counter()
    outputs = model.generate_batch(prompts, generation_config=generation)
    seconds = time.perf_counter() - began
    count = sum(len(output.generated_tokens) for output in outputs.values())
    del model
    torch.cuda.empty_cache()
    return count / seconds
