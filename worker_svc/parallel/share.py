"""What one rank of a group has of a model, and of a KV block. Sizes only: which rows and columns, the loader knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.errors import SettingsError
from worker_svc.models.spec import DecoderSpec, DenseMlp, GroupedQueries, Latent, LayerSpec, Mixture


def share_of(spec: DecoderSpec, size: int) -> DecoderSpec:
    """The decoder that each of `size` ranks is: a share of the heads, and of the inner channels of MLPs and experts.

    All ranks have whole what is between the layers, and the latents of latent attention.

    Raises:
        SettingsError: something does not divide.
    """
    if size == 1:
        return spec
    shares = {layer: _share_of_layer(layer, size) for layer in set(spec.layers)}
    return replace(spec, layers=tuple(shares[layer] for layer in spec.layers))


def _share_of_layer(layer: LayerSpec, size: int) -> LayerSpec:
    return LayerSpec(_share_of_attention(layer.attention, size), _share_of_mlp(layer.mlp, size))


def _share_of_attention(spec: GroupedQueries | Latent, size: int) -> GroupedQueries | Latent:
    if isinstance(spec, Latent):
        return replace(spec, num_heads=_divide(spec.num_heads, size, "attention heads"))
    heads = spec.heads
    num_kv_heads = _divide(heads.num_kv_heads, size, "KV heads")
    return replace(spec, heads=replace(heads, num_heads=heads.num_heads // size, num_kv_heads=num_kv_heads))


def _share_of_mlp(spec: DenseMlp | Mixture, size: int) -> DenseMlp | Mixture:
    if isinstance(spec, DenseMlp):
        return replace(spec, intermediate_size=_divide(spec.intermediate_size, size, "inner channels of an MLP"))
    return replace(
        spec,
        intermediate_size=_divide(spec.intermediate_size, size, "inner channels of an expert"),
        shared_size=_divide(spec.shared_size, size, "inner channels of the shared experts"),
    )


def _divide(number: int, size: int, what: str) -> int:
    if number % size:
        raise SettingsError(f"tensor_parallel: the model has {number} {what}, which {size} ranks cannot share evenly")
    return number // size


@dataclass(frozen=True, slots=True)
class BlockShares:
    """How a KV block is made of the ranks' own: blocks are exchanged whole, so that workers of any size share them.

    A block is [L, 2, KH, S * D] of keys and values, and each rank has some of the KH heads; or every rank has the same.
    """

    num_layers: int
    size: int
    is_divided: bool

    @classmethod
    def of(cls, spec: DecoderSpec, size: int) -> BlockShares:
        """`spec`: of the whole model."""
        return cls(spec.num_layers, size, isinstance(spec.layers[0].attention, GroupedQueries))

    def block_bytes(self, rank_bytes: int) -> int:
        """Size of a block whose share on each rank has `rank_bytes`."""
        return rank_bytes * self.size if self.is_divided else rank_bytes

    def join(self, shares: Sequence[bytes]) -> bytes:
        """The block of these shares, one of each rank."""
        if not self.is_divided:
            return shares[0]
        views = [np.frombuffer(share, np.uint8).reshape(self.num_layers, 2, -1) for share in shares]
        return np.concatenate(views, axis=2).tobytes()

    def split(self, block: bytes) -> list[bytes]:
        """The share of each rank."""
        if not self.is_divided:
            return [block] * self.size
        view = np.frombuffer(block, np.uint8).reshape(self.num_layers, 2, self.size, -1)
        return [view[:, :, rank].tobytes() for rank in range(self.size)]
