"""Prompt lookup: what followed the last time that a sequence ended as it does now. Pure.

Text that quotes, edits, sums up or repeats what stands before it goes on as it did there. So the draft is what
followed the longest earlier occurrence of the sequence's last tokens, the latest of equally long ones (Saxena 2023,
"Prompt Lookup Decoding").

The index is that of LZ77 compressors, hash chains as in zlib: for each pair of tokens the latest place after it, and
for each place the one before it after the same pair. A token appended costs two entries. A match that goes on as the
sequence does remains the longest, so the chain is walked only where a match breaks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from worker_svc.speculation.acceptance import NO_DRAFT, Draft

# Longer matches are no surer, and comparing is work.
MAX_MATCH: Final = 16
# Places looked at for the longest match, the latest first: bounds the work for pairs that are everywhere.
MAX_PLACES: Final = 32
# Grades of the drafted tokens are lengths of matches; at first each token that agrees makes the next surer like this,
# which is about right for tales by the demo model at temperatures below 1.
FIRST_CHANCES: Final = tuple(1 - 0.8**length for length in range(MAX_MATCH + 1))

_TOKEN_BITS: Final = 32
_NO_PLACE: Final = -1


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of a sequence's end."""

    place: int  # index of the token that followed
    length: int  # tokens that agree, `MAX_MATCH` at most


class NgramIndex:
    """The tokens of one sequence, and where they occurred: about a hundred bytes a token."""

    __slots__ = ("_before", "_latest", "_latest_after", "_match", "_token_ids")

    def __init__(self) -> None:
        self._token_ids = array("I")
        self._latest: dict[int, int] = {}  # by pair, as one number: the latest place after it
        self._latest_after: dict[int, int] = {}  # the same by single token, for want of a pair
        self._before = array("i")  # by place: the one before it after the same pair
        self._match: Match | None = None

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens: a prompt, a part of it, or what was generated. O(1) a token."""
        if self._match is not None:
            self._match = self._follow(self._match, token_ids)
        latest, latest_after, before = self._latest, self._latest_after, self._before
        last, pair = (self._token_ids[-1], self._pair()) if self._token_ids else (None, None)
        # A pair is entered when it is known what follows it: so the end of the sequence does not find itself.
        for place, token_id in enumerate(token_ids, len(self._token_ids)):
            if pair is None:
                before.append(_NO_PLACE)
            else:
                before.append(latest.get(pair, _NO_PLACE))
                latest[pair] = place
            if last is not None:
                latest_after[last] = place
                pair = last << _TOKEN_BITS | token_id
            last = token_id
        self._token_ids.extend(token_ids)

    def find(self) -> Match | None:
        """The longest match of the sequence's end, the latest of equally long ones.

        Mutates: keeps the match, and follows it as the sequence grows.
        """
        if self._match is None and self._token_ids:
            self._match = self._search()
        return self._match

    def propose(self, count: int) -> Draft:
        """The `count` tokens that followed the match, or none; the grade of each is the match's length before it.

        What followed may reach the end of the sequence. It then goes on with the draft itself, as text does that
        repeats the same few tokens over and over.
        """
        match = self.find() if count else None
        if match is None:
            return NO_DRAFT
        token_ids = self._token_ids[match.place : match.place + count].tolist()
        period = len(self._token_ids) - match.place
        while len(token_ids) < count:
            token_ids.append(token_ids[-period])
        return Draft(token_ids, [min(match.length + i, MAX_MATCH) for i in range(count)])

    def _follow(self, match: Match, token_ids: Sequence[int]) -> Match | None:
        """The match after `token_ids`, which are not appended yet; None if what followed it was something else."""
        period = len(self._token_ids) - match.place
        for i, token_id in enumerate(token_ids):
            expected = self._token_ids[match.place + i] if i < period else token_ids[i - period]
            if expected != token_id:
                return None
        return Match(match.place + len(token_ids), min(match.length + len(token_ids), MAX_MATCH))

    def _search(self) -> Match | None:
        pair = self._pair()
        place = _NO_PLACE if pair is None else self._latest.get(pair, _NO_PLACE)
        if place == _NO_PLACE:
            place = self._latest_after.get(self._token_ids[-1], _NO_PLACE)
            return None if place == _NO_PLACE else Match(place, 1)
        best = Match(place, 0)
        for _ in range(MAX_PLACES):
            length = self._agreement(place)
            if length > best.length:
                best = Match(place, length)
            place = self._before[place]
            if length == MAX_MATCH or place == _NO_PLACE:
                break
        return best

    def _pair(self) -> int | None:
        """The last two tokens as one number."""
        if len(self._token_ids) < 2:
            return None
        return self._token_ids[-2] << _TOKEN_BITS | self._token_ids[-1]

    def _agreement(self, place: int) -> int:
        """How many of the tokens before `place` are the sequence's last ones. At least a pair of them is."""
        token_ids = self._token_ids
        shift = len(token_ids) - place
        first = max(place - MAX_MATCH, 0)
        start = place - 2
        while start > first and token_ids[start - 1] == token_ids[start - 1 + shift]:
            start -= 1
        return place - start
