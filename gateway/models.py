"""What the gateway knows of the models that can be asked for: their cards and tokenizers, fetched over the bus."""

from __future__ import annotations

import asyncio
import logging
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from gateway.detokenize import Vocabulary
from weft import subjects
from weft.bus import Bus
from weft.errors import DecodeError, NotFound, Unavailable, WeftError
from weft.messages import ModelCard, ModelQuery, TokenizerFetch, TokenizerPiece

log = logging.getLogger(__name__)
FETCH_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 0.5
# Unpacked; the largest known tokenizers have some 30 MB.
MAX_TOKENIZER_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Model:
    card: ModelCard
    vocabulary: Vocabulary


class ModelTable:
    """The models that tokenizers have announced; they stay known while their tokenizers restart."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._models: dict[str, Model] = {}
        self._wanted: set[str] = set()
        self.any_known = asyncio.Event()

    def cards(self) -> list[ModelCard]:
        return [model.card for model in self._models.values()]

    def get(self, name: str) -> Model:
        """Raises NotFound, which lists what there is, or Unavailable while there is nothing yet."""
        model = self._models.get(name)
        if model is not None:
            return model
        if not self._models:
            raise Unavailable("no model is ready yet", retry_after_s=1.0)
        known = ", ".join(sorted(self._models))
        raise NotFound(f"The model {name!r} does not exist; there is {known}.", param="model")

    async def learn(self, names: tuple[str, ...]) -> None:
        """Fetch what is not known of these models, again and again until it is there or nobody offers it."""
        for name in names:
            if name not in self._wanted:
                self._wanted.add(name)
                try:
                    await self._learn(name)
                finally:
                    self._wanted.discard(name)

    async def _learn(self, name: str) -> None:
        while True:
            try:
                card = await self._bus.ask(subjects.model(name), ModelQuery(name), ModelCard, timeout_s=FETCH_TIMEOUT_S)
                known = self._models.get(name)
                if known is not None and known.card.tokenizer_digest == card.tokenizer_digest:
                    self._models[name] = Model(card, known.vocabulary)
                else:
                    text = await self._fetch(card)
                    # Building the tables of a large vocabulary takes a second, which streams must not wait for.
                    vocabulary = await asyncio.to_thread(Vocabulary, text)
                    self._models[name] = Model(card, vocabulary)
                self.any_known.set()
                log.info("model known", extra={"model": name, "max_model_len": card.max_model_len})
                return
            except Unavailable:
                # Whoever offers it next announces it.
                return
            except WeftError as error:
                log.warning("model not fetched", extra={"model": name, "error": error.message})
                await asyncio.sleep(RETRY_S)

    async def _fetch(self, card: ModelCard) -> str:
        pieces, size = [], 0
        while size < card.tokenizer_bytes:
            piece = await self._bus.ask(
                subjects.model(card.model),
                TokenizerFetch(card.model, card.tokenizer_digest, size),
                TokenizerPiece,
                timeout_s=FETCH_TIMEOUT_S,
            )
            if piece.offset != size or not piece.data:
                raise DecodeError(f"piece of the tokenizer of {card.model} is not the one asked for")
            pieces.append(piece.data)
            size += len(piece.data)
        return await asyncio.to_thread(unpack, b"".join(pieces), card.tokenizer_digest)


def unpack(packed: bytes, digest: bytes) -> str:
    """The tokenizer.json in its zlib wrapping.

    Raises:
        DecodeError: damaged, not the one that `digest` names, or unreasonably large.
    """
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, MAX_TOKENIZER_BYTES)
    except zlib.error as error:
        raise DecodeError(f"the tokenizer cannot be unpacked: {error}") from error
    if unpacker.unconsumed_tail:
        raise DecodeError(f"the tokenizer is larger than {MAX_TOKENIZER_BYTES} bytes")
    # Of the file, not of its wrapping, which differs from one zlib to the next.
    if blake2b(text, digest_size=16).digest() != digest:
        raise DecodeError("the tokenizer is not the one announced")
    return text.decode("utf-8", errors="strict")
