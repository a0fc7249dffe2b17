"""One choice's tokens to the text its client gets: stop strings, the finish, logprobs, the count for usage. Pure.

Text that may still turn out to begin a stop string is held back, so a stop string never leaks. Tokens are taken one
by one however they arrive, so the answer does not depend on how the worker's frames cut them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from gateway.detokenize import Vocabulary
from weft.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP

# A sampled token's log probability, and the likeliest tokens' ids and log probabilities.
RawLogprob: TypeAlias = tuple[float, Sequence[int], Sequence[float]]

_REASONS = {FINISH_STOP: "stop", FINISH_LENGTH: "length"}


class TokenLogprob(msgspec.Struct, frozen=True):
    """The log probability of one token, given as its bytes (`Vocabulary.token_bytes`), and of the likeliest ones."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    text_offset: int  # characters of the completion before its text


# A Struct, for one is made for every token: a frozen dataclass takes five times as long to make.
class Delta(msgspec.Struct, frozen=True):
    """What one push adds to the answer."""

    text: str
    finish_reason: str | None = None  # "stop" or "length"
    # Each token's, once, not before the text it begins with.
    logprobs: tuple[TokenLogprob, ...] = ()


class Assembler:
    """The text of one choice. After its finish it ignores everything.

    `token_ids` are the tokens taken so far, which a recovery hands out again. `num_counted` of them are billed: all,
    as nothing after the token that completes a stop string is taken.
    """

    __slots__ = (
        "_decoder",
        "_has_logprobs",
        "_held",
        "_logprobs",
        "_min_tokens",
        "_num_decoded",
        "_stop",
        "_vocabulary",
        "finish_reason",
        "token_ids",
    )

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stop: tuple[str, ...],
        min_tokens: int,
        logprobs: bool,
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._vocabulary = vocabulary
        self._decoder = vocabulary.decoder()
        self._stop = stop
        self._min_tokens = min_tokens
        self._has_logprobs = logprobs
        self._held = ""
        self._num_decoded = 0  # characters, held ones included
        self._logprobs: deque[TokenLogprob] = deque()

    @property
    def num_counted(self) -> int:
        return len(self.token_ids)

    def push(self, token_ids: Sequence[int], finish: int, logprobs: Sequence[RawLogprob] = ()) -> Delta | None:
        """Take the next tokens; None if there is nothing to tell the client.

        Args:
            token_ids: with FINISH_STOP, the last of them is counted but not shown.
            finish: FINISH_NONE, FINISH_STOP or FINISH_LENGTH.
            logprobs: one for each token, or none.
        """
        if self.finish_reason is not None:
            return None
        num_shown = len(token_ids) - (finish == FINISH_STOP)
        text = ""
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if self._has_logprobs and i < len(logprobs):
                self._logprobs.append(self._look_up(token_id, logprobs[i]))
            if i < num_shown:
                text += self._take(self._decoder.push(token_id))
                if self.finish_reason is not None:
                    return self._end(text)
        if finish != FINISH_NONE:
            text += self._take(self._decoder.finish())
            if self.finish_reason is None:
                self.finish_reason = _REASONS[finish]
                text += self._held
            return self._end(text)
        if not text:
            return None
        return Delta(text, None, self._release_logprobs() if self._logprobs else ())

    def _take(self, piece: str) -> str:
        """Add text; return what can be sent. Sets `finish_reason` if it completes a stop string."""
        self._num_decoded += len(piece)
        if not self._stop or not piece:
            return piece
        num_old = len(self._held)
        text = self._held + piece
        self._held = ""
        if len(self.token_ids) >= self._min_tokens:
            start = _find_stop(text, num_old, self._stop)
            if start is not None:
                self.finish_reason = "stop"
                return text[:start]
        cut = _find_beginning(text, self._stop)
        self._held = text[cut:]
        return text[:cut]

    def _end(self, text: str) -> Delta:
        logprobs = tuple(self._logprobs)
        self._logprobs.clear()
        self._held = ""
        return Delta(text, self.finish_reason, logprobs)

    def _look_up(self, token_id: int, raw: RawLogprob) -> TokenLogprob:
        logprob, top_token_ids, top_values = raw
        look_up = self._vocabulary.token_bytes
        return TokenLogprob(
            look_up(token_id),
            logprob,
            tuple((look_up(one), value) for one, value in zip(top_token_ids, top_values, strict=True)),
            self._num_decoded,
        )

    def _release_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those of the tokens whose text has begun to be sent."""
        num_sent = self._num_decoded - len(self._held)
        released = []
        while self._logprobs and self._logprobs[0].text_offset < num_sent:
            released.append(self._logprobs.popleft())
        return tuple(released)


def _find_stop(text: str, num_old: int, stop: tuple[str, ...]) -> int | None:
    """Where the earliest stop string begins that ends after the first `num_old` characters."""
    earliest = None
    for one in stop:
        start = text.find(one, max(0, num_old - len(one) + 1))
        if start >= 0 and (earliest is None or start < earliest):
            earliest = start
    return earliest


def _find_beginning(text: str, stop: tuple[str, ...]) -> int:
    """Where the longest end of `text` begins that is a beginning, but not the whole, of a stop string."""
    cut = len(text)
    for one in stop:
        start = text.find(one[0], max(0, len(text) - len(one) + 1), cut)
        while start >= 0:
            if one.startswith(text[start:]):
                cut = start
                break
            start = text.find(one[0], start + 1, cut)
    return cut
