"""The shapes that are measured, as folders that hold a config.json: weights are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_len: int = 4096

    @property
    def token_bytes(self) -> int:
        """Of a token in a KV cache in float32."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 4

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's linears as they are fused, in order."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return [
            (qkv, self.hidden_size),
            (self.hidden_size, self.num_heads * self.head_dim),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        ]


NANO: Final = Shape("nano", 256, 6, 8, 4, 32, 704, 4096)
SMALL: Final = Shape("small", 768, 12, 12, 4, 64, 2048, 32000)


@contextmanager
def folder(shape: Shape) -> Iterator[Path]:
    """A folder to load with `--load-format dummy`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_len,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    with TemporaryDirectory(prefix=f"weft-{shape.name}-") as path:
        (Path(path) / "config.json").write_text(json.dumps(config))
        yield Path(path)
