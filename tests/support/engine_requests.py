"""Requests and settings for engine tests, as the tokenizer and the service would make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from weft.columns import pack_u32
from weft.hashing import block_hashes, chain_root
from weft.messages import BlockHash, Choice, SamplingParams, TokenizedRequest
from weft.model_folder import ModelFolder
from weft.settings import MeshSettings, ModelSettings, WorkerSettings
from worker_svc.sequence import Request
from worker_svc.sequence import Sequence as EngineSequence

DIGEST = b"d" * 16


def make_folder(*, vocab_size: int = 64, max_model_len: int = 256, eos: tuple[int, ...] = (2,)) -> ModelFolder:
    """A folder for engines that never open it."""
    return ModelFolder(Path("."), "fake", {}, max_model_len, vocab_size, eos, SamplingParams())


def make_settings(**changes: Any) -> WorkerSettings:
    return dataclasses.replace(WorkerSettings(MeshSettings(), ModelSettings()), **changes)


def make_request(
    prompt: Sequence[int],
    *,
    request_id: str = "r0",
    epoch: int = 0,
    gateway: str = "g0",
    sampling: SamplingParams | None = None,
    emitted: Sequence[Sequence[int]] = ((),),
    seeds: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
    digest: bytes = DIGEST,
    salt: str = "",
) -> TokenizedRequest:
    """One choice for each of `emitted`; slots and seeds count up from 0 unless given."""
    tokens = pack_u32(prompt)
    slots = range(len(emitted)) if slots is None else slots
    seeds = range(len(emitted)) if seeds is None else seeds
    return TokenizedRequest(
        request_id=request_id,
        epoch=epoch,
        gateway=gateway,
        model="fake",
        prompt_token_ids=tokens,
        block_hashes=b"".join(block_hashes(chain_root(digest, salt), tokens)),
        sampling=sampling or SamplingParams(temperature=0.0),
        choices=[Choice(slot, seed, pack_u32(ids)) for slot, seed, ids in zip(slots, seeds, emitted, strict=True)],
        cache_salt=salt,
    )


def make_sequence(
    prompt: Sequence[int],
    *,
    emitted: Sequence[int] = (),
    sampling: SamplingParams | None = None,
    seed: int = 0,
    arrival: int = 0,
    end_length: int = 10**9,
    stop_ids: Iterable[int] = (),
    root: BlockHash | None = None,
    hashes: Iterable[BlockHash] = (),
) -> EngineSequence:
    return EngineSequence(
        request=Request("r0", "g0", 0),
        arrival=arrival,
        slot=0,
        seed=seed,
        sampling=sampling or SamplingParams(),
        token_ids=[*prompt, *emitted],
        num_prompt_tokens=len(prompt),
        end_length=end_length,
        stop_ids=frozenset(stop_ids),
        root=root,
        hashes=list(hashes),
    )
