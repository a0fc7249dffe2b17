"""How likely the tokens of a draft are accepted: measured, by grade, and corrected for the sequence. Pure.

Whoever drafts gives each token a grade, a small number that says how sure it looks: the length of the match for prompt
lookup, the confidence for a draft model. What share of a grade was accepted of late is a better guide than any rule:
of texts by the demo model, 1 token in 4 was right after a match of one token, and 3 in 4 after one of five.

A text that copies is right more often at every grade than one that does not. So each sequence has odds of its own, a
factor on those of the grades, that follow its last tokens as a player's rating follows the last games (Elo 1978).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

# How much what is believed of a grade at first weighs: as if so many of its tokens had been seen.
PRIOR_TRIALS: Final = 4.0
# Weight of the past when one more token of a grade is counted: some fifty tokens are remembered.
RATE_MEMORY: Final = 0.98
# How far a sequence's log odds move when a token is a full surprise: another kind of text shows within ten tokens.
SEQUENCE_STEP: Final = 0.4
# More certainty than this is worth nothing and takes longer to unlearn.
MAX_LOG_ODDS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next in a sequence, and the grade of each."""

    token_ids: Sequence[int]
    grades: Sequence[int]


NO_DRAFT: Final = Draft((), ())


class AcceptanceRates:
    """The odds of each grade, over all sequences."""

    __slots__ = ("_accepted", "_trials", "odds")

    def __init__(self, chances: Sequence[float]) -> None:
        """`chances`: what is believed of each grade at first."""
        self._accepted = [PRIOR_TRIALS * chance for chance in chances]
        self._trials = [PRIOR_TRIALS] * len(chances)
        self.odds = [chance / (1 - chance) for chance in chances]

    def observe(self, grade: int, is_accepted: bool) -> None:
        accepted = RATE_MEMORY * self._accepted[grade] + is_accepted
        trials = RATE_MEMORY * self._trials[grade] + 1
        self._accepted[grade], self._trials[grade] = accepted, trials
        # Half a token more on both sides keeps the odds finite.
        self.odds[grade] = (accepted + 0.5) / (trials - accepted + 0.5)


class SequenceAcceptance:
    """The chances of one sequence's drafts."""

    __slots__ = ("_factor", "_log_odds", "_rates")

    def __init__(self, rates: AcceptanceRates) -> None:
        self._rates = rates
        self._log_odds = 0.0
        self._factor = 1.0  # exp(_log_odds)

    def chances(self, grades: Iterable[int], least: float) -> list[float]:
        """For each token of a draft, the chance that it and all before it are accepted; ends where it is below `least`.

        Args:
            least: over 0.
        """
        chances: list[float] = []
        chance = 1.0
        for grade in grades:
            chance *= self._chance(grade)
            if chance < least:
                break
            chances.append(chance)
        return chances

    def observe(self, draft: Draft, token_ids: Iterable[int]) -> None:
        """Learn from the tokens that came where `draft` had been foreseen, whether it was computed or not."""
        for drafted, grade, token_id in zip(draft.token_ids, draft.grades, token_ids, strict=False):
            is_accepted = drafted == token_id
            moved = self._log_odds + SEQUENCE_STEP * (is_accepted - self._chance(grade))
            self._log_odds = min(max(moved, -MAX_LOG_ODDS), MAX_LOG_ODDS)
            self._rates.observe(grade, is_accepted)
            if not is_accepted:
                break
        self._factor = math.exp(self._log_odds)

    def _chance(self, grade: int) -> float:
        odds = self._rates.odds[grade] * self._factor
        return odds / (1 + odds)
