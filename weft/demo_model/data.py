"""Endless token streams for training: tales whole, chats with only the assistant's words to be learned."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from weft.demo_model.corpus import Tale
from weft.demo_model.tokenizer import BOS, END, EOS, ROLE_TOKENS, token_id

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids `[T]` and, of the same length, whether the model should learn to predict each."""

    token_ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs `[B, T]` and labels `[B, T]`, already shifted by one; `is_chat` `[B]` marks the rows of chats."""

    token_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    is_chat: npt.NDArray[np.bool_]


class TokenStream:
    """Documents end to end, without end: each epoch is made anew and shuffled."""

    def __init__(self, make_documents: Callable[[Random], list[Document]], rng: Random) -> None:
        self._make_documents = make_documents
        self._rng = rng
        self._token_ids = np.empty(0, np.int64)
        self._learned = np.empty(0, np.bool_)

    def take(self, num_tokens: int) -> Document:
        """Return the next `num_tokens` tokens.

        Mutates: the stream's place.
        """
        while len(self._token_ids) < num_tokens:
            documents = self._make_documents(self._rng)
            self._rng.shuffle(documents)
            self._token_ids = np.concatenate([self._token_ids, *(d.token_ids for d in documents)])
            self._learned = np.concatenate([self._learned, *(d.learned for d in documents)])
        taken = Document(self._token_ids[:num_tokens], self._learned[:num_tokens])
        self._token_ids, self._learned = self._token_ids[num_tokens:], self._learned[num_tokens:]
        return taken


def next_batch(tales: TokenStream, chats: TokenStream, num_rows: int, num_chat_rows: int, seq_len: int) -> Batch:
    """Draw a batch whose first `num_chat_rows` rows are chats."""
    rows = [(chats if row < num_chat_rows else tales).take(seq_len + 1) for row in range(num_rows)]
    token_ids = np.stack([row.token_ids for row in rows])
    learned = np.stack([row.learned for row in rows])
    return Batch(
        token_ids[:, :-1],
        np.where(learned, token_ids, IGNORED)[:, 1:],
        np.arange(num_rows) < num_chat_rows,
    )


def encode_tales(tokenizer: Tokenizer, tales: Iterable[Tale]) -> list[Document]:
    """One document per tale, from `<|bos|>` to `<|eos|>`."""
    encoded = tokenizer.encode_batch([f"{BOS}{tale.text}{EOS}" for tale in tales], add_special_tokens=False)
    return [_document(encoding.ids, True) for encoding in encoded]


def encode_chats(tokenizer: Tokenizer, chats: Sequence[Sequence[tuple[str, str]]]) -> list[Document]:
    """One document per chat of (role, content) turns, as the chat template writes it."""
    turns = [(role, f"{content}{END}") for chat in chats for role, content in chat]
    encoded = iter(tokenizer.encode_batch([text for _, text in turns], add_special_tokens=False))
    bos = _document([token_id(tokenizer, BOS)], False)
    documents = []
    for chat in chats:
        parts = [bos]
        for role, _ in chat:
            parts.append(_document([token_id(tokenizer, ROLE_TOKENS[role])], False))
            parts.append(_document(next(encoded).ids, role == "assistant"))
        documents.append(_join(parts))
    return documents


def _document(token_ids: list[int], learned: bool) -> Document:
    return Document(np.array(token_ids, np.int64), np.full(len(token_ids), learned))


def _join(parts: list[Document]) -> Document:
    return Document(
        np.concatenate([part.token_ids for part in parts]), np.concatenate([part.learned for part in parts])
    )
