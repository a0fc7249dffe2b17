"""The models that are measured, made when they are missing: Llama shapes with random weights and the demo's tokenizer.

`nano` has 6.5 million parameters, `small` 125 million. llama.cpp reads a file of its own format, which its converter
writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lab.report import say
from weft.model_folder import BUNDLED

_SHAPES = {
    "nano": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 4096,
    },
    "small": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
}
# The converter looks a tokenizer up among published ones. Prompts come as token ids, so how it splits text is all one.
_CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
from conversion.llama import LlamaModel
TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
LlamaModel.set_vocab = lambda model: model._set_vocab_gpt2()
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


def folder(peers: Path, model: str) -> Path:
    """The Hugging Face folder of a model, in float32."""
    path = peers / "ckpt" / model
    if not (path / "tokenizer.json").exists():
        say(f"  making {path}")
        path.mkdir(parents=True, exist_ok=True)
        _write_weights(path, _SHAPES[model])
        # Last, since a folder with it counts as whole.
        _write_tokenizer(path, _SHAPES[model]["vocab_size"])
    return path


def gguf(peers: Path, source: Path, model: str, kind: str) -> Path:
    """The same model as a file of llama.cpp; `kind` is f32 or q8_0, `source` the source tree with the converter.

    Raises:
        CalledProcessError: the converter failed.
    """
    path = peers / f"{model}-{kind}.gguf"
    if not path.exists():
        say(f"  making {path}")
        unfinished = path.with_suffix(".part")
        names = [str(source), str(folder(peers, model)), "--outfile", str(unfinished), "--outtype", kind]
        subprocess.run([sys.executable, "-c", _CONVERT, *names], cwd=source, check=True, capture_output=True)
        os.replace(unfinished, path)
    return path


def _write_weights(path: Path, shape: dict[str, int]) -> None:
    # Heavy, and needed once.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(path)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """The bundled tokenizer, with a named token for every id that it lacks: converters insist on that."""
    bundled = BUNDLED / "tales-6m"
    tokenizer = json.loads((bundled / "tokenizer.json").read_text("utf-8"))
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [
        {"id": number, "content": f"<filler_{number}>", **switches}
        for number in range(len(tokenizer["model"]["vocab"]), vocab_size)
    ]
    (path / "tokenizer_config.json").write_bytes((bundled / "tokenizer_config.json").read_bytes())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
