"""Random steps for the attention kernels, for checks, timings and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.kernels.mla_attention import mla_attention, mla_attention_reference
from worker_svc.kernels.paged_attention import QUANTIZED, paged_attention, paged_attention_reference
from worker_svc.kernels.tuning import Config
from worker_svc.kernels.varlen import VarlenBatch, sequence_slots

Lengths = tuple[Sequence[int], Sequence[int]]  # queries of each sequence, its tokens after the step
NUM_SPARE_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a layer and what its queries see."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `paged_attention`."""
        return {"softmax_scale": self.head_dim**-0.5, "window": self.window, "soft_cap": self.soft_cap}


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Heads of a layer with latent attention."""

    num_heads: int
    latent_dim: int
    rope_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mla_attention`."""
        return {"latent_dim": self.latent_dim, "softmax_scale": (self.latent_dim // 4 + self.rope_dim) ** -0.5}


@dataclass(frozen=True, slots=True)
class Step:
    """Inputs of `paged_attention`."""

    q: torch.Tensor
    kv: torch.Tensor
    kv_scales: torch.Tensor | None
    batch: VarlenBatch
    shape: Shape

    def attend(self, config: Config | None = None) -> torch.Tensor:
        """Run the kernel."""
        options = self.shape.options
        return paged_attention(self.q, self.kv, self.batch, kv_scales=self.kv_scales, config=config, **options)

    def expected(self) -> torch.Tensor:
        """What the reference gives for the same inputs, float64."""
        q, options = self.q.double(), self.shape.options
        return paged_attention_reference(q, self.kv, self.batch, kv_scales=self.kv_scales, **options)


@dataclass(frozen=True, slots=True)
class LatentStep:
    """Inputs of `mla_attention`."""

    q: torch.Tensor
    cache: torch.Tensor
    batch: VarlenBatch
    shape: LatentShape

    def attend(self, config: Config | None = None) -> torch.Tensor:
        """Run the kernel."""
        return mla_attention(self.q, self.cache, self.batch, config=config, **self.shape.options)

    def expected(self) -> torch.Tensor:
        """What the reference gives for the same inputs, float64."""
        return mla_attention_reference(self.q.double(), self.cache, self.batch, **self.shape.options)


def make_step(device: torch.device, lengths: Lengths, shape: Shape, num_padding_rows: int = 0) -> Step:
    """Random inputs. q is a view of q, k and v in one tensor, as a model has it; slots without owner hold NaN."""
    batch = random_batch(device, lengths)
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    num_rows = sum(lengths[0]) + num_padding_rows
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, shape.head_dim, device=device)
    kv = torch.randn(2 * num_kv_heads, num_slots(lengths), shape.head_dim, device=device, dtype=shape.dtype)
    kv[:, unowned_slots(batch, lengths)] = torch.nan
    return Step(qkv[:, :num_heads].to(shape.dtype), *quantize(kv, shape.kv_dtype), batch, shape)


def make_latent_step(
    device: torch.device, lengths: Lengths, shape: LatentShape, num_padding_rows: int = 0
) -> LatentStep:
    """Random inputs; slots without owner hold NaN."""
    batch, key_dim = random_batch(device, lengths), shape.latent_dim + shape.rope_dim
    q = torch.randn(sum(lengths[0]) + num_padding_rows, shape.num_heads, key_dim, device=device).to(shape.dtype)
    cache = torch.randn(num_slots(lengths), key_dim, device=device).to(shape.dtype)
    cache[unowned_slots(batch, lengths)] = torch.nan
    return LatentStep(q, cache, batch, shape)


def random_batch(device: torch.device, lengths: Lengths) -> VarlenBatch:
    """Sequences whose blocks lie anywhere in a cache; what a table holds beyond a sequence's blocks is out of range."""
    query_lens, seq_lens = lengths
    counts = [-(-length // BLOCK_SIZE) for length in seq_lens]
    free = iter(torch.randperm(sum(counts) + NUM_SPARE_BLOCKS).tolist())
    width = max(counts) + 1
    tables = [[next(free) for _ in range(count)] + [2**30] * (width - count) for count in counts]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    cu_seqlens, lens, blocks = (torch.as_tensor(it, dtype=torch.int32).to(device) for it in (starts, seq_lens, tables))
    return VarlenBatch(cu_seqlens, lens, blocks, max(query_lens), max(seq_lens))


def num_slots(lengths: Lengths) -> int:
    """Of the cache that a random batch is for."""
    return (sum(-(-length // BLOCK_SIZE) for length in lengths[1]) + NUM_SPARE_BLOCKS) * BLOCK_SIZE


def unowned_slots(batch: VarlenBatch, lengths: Lengths) -> torch.Tensor:
    """[slots] bool: those that no sequence of the batch has a token in."""
    is_unowned = torch.ones(num_slots(lengths), dtype=torch.bool, device=batch.seq_lens.device)
    for sequence in range(len(lengths[1])):
        is_unowned[sequence_slots(batch, sequence)] = False
    return is_unowned


def quantize(kv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cache in `dtype`, and its scale per slot and head; None for a float type. NaN gets a scale of NaN."""
    if dtype not in QUANTIZED:
        return kv.to(dtype), None
    scales = kv.float().abs().amax(-1) / (127.0 if dtype == torch.int8 else 448.0)
    scaled = (kv.float() / scales[..., None]).nan_to_num()
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales
