"""One model on one device: KV blocks beside its weights, and the forward pass of one engine step.

Knows tokens, positions and slots; what they belong to, and why, is the engine's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import torch

from weft.errors import DecodeError
from weft.hashing import BLOCK_SIZE
from weft.model_folder import ModelFolder
from worker_svc.backends.backend import Batch, with_ends
from worker_svc.backends.numba_backend import NumbaBackend
from worker_svc.backends.recorded_steps import RecordedSteps
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.loaded_model import LoadedModel, count_threads, load_model
from worker_svc.memory import count_blocks, free_bytes, kv_bytes, zeros
from worker_svc.model_options import ModelOptions
from worker_svc.parallel.group import ALONE, Group
from worker_svc.sampler import Sampler
from worker_svc.step_input import StepInput
from worker_svc.threads import Threads

if TYPE_CHECKING:
    from worker_svc.device_sampler import DeviceSampler

log = logging.getLogger(__name__)

# Rows that a step is recorded for, and how many of them have logits; larger ones have enough to do.
MAX_RECORDED_ROWS: Final = 256
MAX_RECORDED_ENDS: Final = 64


class ModelRunner(Protocol):
    """What an engine needs of a model: `Runner` is one on one device, `parallel.leader.ParallelRunner` on several."""

    device: torch.device
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_bytes: int
    layout: bytes

    def forward(self, step: StepInput, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """As `Runner`."""

    def make_sampler(self) -> Sampler | DeviceSampler:
        """As `Runner`."""

    def copy_block(self, source: int, target: int) -> None:
        """As `Runner`."""

    def read_blocks(self, block_ids: list[int]) -> list[bytes]:
        """As `Runner`."""

    def write_blocks(self, block_ids: list[int], blocks: list[bytes]) -> None:
        """As `Runner`."""

    def close(self) -> None:
        """End other processes that compute along, if there are any. Nothing can be computed afterwards."""


class KnownSteps(Protocol):
    """Steps that were prepared."""

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Compute the step. Returns: logits [B, V], which the next replay overwrites; None if it is not known."""


class Runner:
    """A loaded model, which others may use as well, with a KV cache of its own."""

    def __init__(
        self,
        model: LoadedModel,
        options: ModelOptions,
        *,
        more_block_bytes: int = 0,
        agree: Callable[[int], int] = lambda num_blocks: num_blocks,
    ) -> None:
        """Allocate the KV cache.

        Args:
            options: of which its memory and threads matter; of those that the model was loaded with, others may differ.
            more_block_bytes: that another model needs for each block, out of the same memory.
            agree: given the blocks that this rank has room for, returns how many all ranks have.

        Raises:
            SettingsError: there is no room for a request.
        """
        folder, spec, cache = model.folder, model.spec, model.cache
        self.device = model.device
        self._dtype, self._backend, self._decoder = model.dtype, model.backend, model.decoder
        self._group_size = model.group.size
        max_threads = count_threads(options.threads, model.group)
        torch.set_num_threads(max_threads)
        self._kinds = frozenset(spec.attention_kinds)
        self.vocab_size = spec.vocab_size
        self._key_bytes = cache.num_heads * cache.width * self._dtype.itemsize
        self.block_bytes = spec.num_layers * BLOCK_SIZE * self._key_bytes
        request_bytes = -(-folder.max_model_len // BLOCK_SIZE) * self.block_bytes
        budget = kv_bytes(options.kv_memory, free_bytes(self.device), request_bytes, self.device, self._group_size)
        self.num_blocks = agree(count_blocks(budget, self.block_bytes + more_block_bytes))
        self._longest = folder.max_model_len
        self.layout = (
            f"weft kv 1: {str(self._dtype).removeprefix('torch.')}, quantize {model.quantize}, "
            f"{spec.num_layers} layers, {cache.content}, {spec.cache.num_heads} heads, {BLOCK_SIZE} slots of "
            f"{cache.width}"
        ).encode()
        self._cache_shape = (spec.num_layers, cache.num_heads, cache.width)
        self.resize(self.num_blocks)
        num_cached = self.block_bytes // (BLOCK_SIZE * self._dtype.itemsize)
        self._threads = Threads(max_threads, model.num_weights, num_cached)
        log.info(
            "model loaded",
            extra={
                "model": folder.name,
                "device": self.device.type,
                "dtype": str(self._dtype).removeprefix("torch."),
                "threads": max_threads,
                "kv_tokens": self.num_blocks * BLOCK_SIZE,
                "max_model_len": self.max_model_len,
            },
        )

    def resize(self, num_blocks: int) -> None:
        """Have another number of blocks, all of them empty."""
        num_layers, num_heads, width = self._cache_shape
        self.num_blocks = num_blocks
        self.max_model_len = min(self._longest, num_blocks * BLOCK_SIZE)
        shape = (num_layers, num_heads, num_blocks * BLOCK_SIZE, width)
        self._kv_cache = zeros(shape, self._dtype, self.device)
        self._known_steps = self._make_known_steps()

    @torch.inference_mode()
    def forward(self, step: StepInput, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the step and write its K and V; returns as soon as the device has the work.

        Args:
            last_tokens: [any] int64 on the device; what the step's pending tokens are taken from.

        Returns:
            Logits: [len(logit_rows), V] float32, on the device; the next step may overwrite them.
        """
        torch.set_num_threads(self._threads.choose(step))
        logits = None if self._known_steps is None else self._known_steps.replay(step, last_tokens)
        if logits is not None:
            return logits
        batch, ends = self._make_batch(step, last_tokens), step.ends()
        if ends is not None:
            batch = with_ends(batch, self._make_batch(ends, None))
        return self._decoder.forward(batch, self._kv_cache)

    def make_sampler(self) -> Sampler | DeviceSampler:
        """The sampler that suits the device."""
        if isinstance(self._backend, TorchBackend):
            return Sampler()
        # Triton is there only where it is used.
        from worker_svc.device_sampler import DeviceSampler

        return DeviceSampler(self.device)

    def _make_batch(self, step: StepInput, last_tokens: torch.Tensor | None) -> Batch:
        return self._backend.make_batch(step, self._kinds, self._key_bytes, last_tokens)

    def _make_known_steps(self) -> KnownSteps | None:
        """What computes steps that differ from others in little but their numbers."""

        def forward(batch: Batch) -> torch.Tensor:
            return self._decoder.forward(batch, self._kv_cache)

        has_latents = any(kind.value_dim is not None for kind in self._kinds)
        if isinstance(self._backend, NumbaBackend):
            if has_latents or self._group_size > 1:
                return None
            windows = {kind.window for kind in self._kinds}
            steps = RecordedSteps(forward, windows, MAX_RECORDED_ROWS, MAX_RECORDED_ENDS)
            return steps if steps.is_whole else None
        if self.device.type != "cuda" or isinstance(self._backend, TorchBackend):
            return None
        # Triton is there only where it is used.
        from worker_svc.backends.cuda_graphs import CudaGraphs

        return CudaGraphs(forward, self.device)

    @torch.inference_mode()
    def copy_block(self, source: int, target: int) -> None:
        """Copy all layers of a block (copy-on-write)."""
        blocks = self._blocks()
        blocks[:, target] = blocks[:, source]

    @torch.inference_mode()
    def read_blocks(self, block_ids: list[int]) -> list[bytes]:
        """Bytes of whole blocks, `block_bytes` each, in the form that `layout` names."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        read = self._blocks().index_select(1, index).transpose(0, 1).contiguous().view(torch.uint8)
        return [block.numpy().tobytes() for block in read.cpu()]

    @torch.inference_mode()
    def write_blocks(self, block_ids: list[int], blocks: list[bytes]) -> None:
        """Put back what `read_blocks` gave, here or in another worker of the same layout.

        Raises:
            DecodeError: a block of another size; nothing is written then.
        """
        sizes = {len(block) for block in blocks} - {self.block_bytes}
        if sizes:
            raise DecodeError(f"a KV block of {sizes.pop()} bytes where one has {self.block_bytes}")
        if not blocks:
            return
        target = self._blocks()
        read = torch.frombuffer(bytearray(b"".join(blocks)), dtype=self._dtype).to(self.device)
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        target.index_copy_(1, index, read.view(len(blocks), target.shape[0], target.shape[2]).transpose(0, 1))

    def close(self) -> None:
        """There is nothing outside this process."""

    def _blocks(self) -> torch.Tensor:
        """The cache by block: [L * heads, N, S * width]."""
        width = self._kv_cache.shape[-1]
        return self._kv_cache.view(-1, self.num_blocks, BLOCK_SIZE * width)


def load_runner(
    folder: ModelFolder,
    options: ModelOptions,
    *,
    more_block_bytes: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
    group: Group = ALONE,
    agree: Callable[[int], int] = lambda num_blocks: num_blocks,
) -> Runner:
    """A runner of a model that nobody else uses. Arguments and errors are those of `load_model` and of `Runner`."""
    model = load_model(folder, options, on_progress=on_progress, group=group)
    return Runner(model, options, more_block_bytes=more_block_bytes, agree=agree)
