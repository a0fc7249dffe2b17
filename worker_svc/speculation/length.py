"""How many drafted tokens a step computes: as many as give the batch the most tokens a second, maybe none. Pure.

The drafted tokens of all sequences compete. Sorted by the chance that they and all before them in their sequence are
accepted, the first D are computed, for the D that is best of

    (B + sum of their chances) / (seconds of B tokens + what D drafted ones add + seconds of drafting)

Within a sequence the chances fall, so these are a beginning of each draft. The best D is exact where a step's seconds
depend on its number of tokens alone. (Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput", maximize the same with one length for all.)

Estimates err, and what is not done is not measured. So there is an account in plain steps: a step without drafts pays
in a little, one with drafts pays in what it saved or takes out what it cost. With nothing in it nothing is drafted, so
that the loss is bounded whatever the estimates say. What seems not to pay is tried now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from worker_svc.speculation.cost import StepCost, shares

# The share of the time that drafts may take that do not pay, trials included.
ALLOWANCE: Final = 0.005
# Plain steps in the account at the beginning, and at most: what was gained before is no reason to lose now.
FIRST_BALANCE: Final = 1.0
MAX_BALANCE: Final = 4.0
# Plain steps after which what seems not to pay is tried.
TRIAL_INTERVAL: Final = 64
# A step that took longer than this many like it was held up by something else.
MAX_SLOWDOWN: Final = 2.0
# Less is not seen in the noise.
MIN_GAIN: Final = 1.005
# Tokens less likely than this to count are not worth thinking of.
MIN_CHANCE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Choice:
    """How much of each sequence's draft is computed."""

    lengths: list[int]
    gain: float  # expected tokens a second, against a step without drafts


class DraftLength:
    """Decides for each decode step, and learns from it."""

    def __init__(self) -> None:
        self._cost = StepCost()
        self._balance = FIRST_BALANCE
        self._num_plain_steps = 0  # in a row

    def least_chance(self, num_sequences: int, num_context: int, max_drafts: int) -> float | None:
        """The chance below which a drafted token cannot pay in this step; None if the step shall have no drafts.

        Args:
            num_context: tokens that the sequences attend to.
            max_drafts: drafted tokens that the step has room for.
        """
        if not max_drafts or self._balance <= 0 or self._cost.plain_seconds(num_sequences, num_context) is None:
            return None
        if self._is_trial_due():
            return MIN_CHANCE
        # A token more raises the rate only if it is likelier to count than it is dear.
        return max(MIN_CHANCE, min(self._cost.token_costs(num_sequences, num_context, max_drafts)))

    def choose(self, chances: Sequence[Sequence[float]], num_context: int, max_drafts: int) -> list[int]:
        """How many tokens of each draft to compute, of drafts that are there already.

        Args:
            chances: for each sequence of the step, those of its draft's tokens, falling; of `least_chance` or more.
        """
        choice = self.weigh(chances, num_context, max_drafts)
        return choice.lengths if choice is not None and self.allows(choice) else [0] * len(chances)

    def weigh(
        self, chances: Sequence[Sequence[float]], num_context: int, max_drafts: int, drafting_s: float = 0.0
    ) -> Choice | None:
        """The best of drafting something, which may be worse than to draft nothing. None if nobody can tell.

        Args:
            drafting_s: seconds that it takes to make the drafts.
        """
        num_sequences = len(chances)
        plain_s = self._cost.plain_seconds(num_sequences, num_context)
        max_drafts = min(max_drafts, sum(map(len, chances)))
        if plain_s is None or not max_drafts:
            return None
        costs = self._cost.token_costs(num_sequences, num_context, max_drafts)
        return best_choice(chances, shares(costs, num_sequences, max_drafts), drafting_s / plain_s)

    def allows(self, choice: Choice) -> bool:
        """Whether to draft: because it pays, or to see whether it does."""
        return self._balance > 0 and (choice.gain >= MIN_GAIN or self._is_trial_due())

    def observe(
        self,
        num_sequences: int,
        num_context: int,
        num_drafts: int,
        num_emitted: int,
        step_s: float,
        *,
        drafting_s: float = 0.0,
        is_held_up: bool = False,
    ) -> float:
        """Learn from a decode step: what it was, how many tokens it emitted, and its seconds.

        Args:
            is_held_up: even without drafts it took longer than it would have if none had been looked for.

        Returns:
            Seconds that were saved against plain steps; below 0 for lost ones.
        """
        if num_drafts or not is_held_up:
            self._cost.observe(num_sequences, num_context, num_drafts, step_s)
        self._num_plain_steps = 0 if num_drafts else self._num_plain_steps + 1
        if not num_drafts and not is_held_up:
            self._pay_in(ALLOWANCE)
            return 0.0
        plain_s = self._cost.plain_seconds(num_sequences, num_context)
        if plain_s is None:
            return 0.0
        share = 0.0
        if num_drafts:
            costs = self._cost.token_costs(num_sequences, num_context, num_drafts)
            share = shares(costs, num_sequences, num_drafts)[-1]
        seconds = min(step_s / plain_s, MAX_SLOWDOWN * (1 + share)) + drafting_s / plain_s
        num_saved = num_emitted / num_sequences - seconds
        self._pay_in(num_saved)
        return num_saved * plain_s

    def _is_trial_due(self) -> bool:
        return self._num_plain_steps % TRIAL_INTERVAL == TRIAL_INTERVAL - 1

    def _pay_in(self, num_steps: float) -> None:
        self._balance = min(self._balance + num_steps, MAX_BALANCE)


def best_choice(chances: Sequence[Sequence[float]], added: Sequence[float], drafting: float = 0.0) -> Choice:
    """The lengths with the most expected tokens a second among those with at least one drafted token.

    Args:
        chances: as for `DraftLength.choose`; at least one.
        added: what 0, 1, ... drafted tokens add to the step, as shares of a plain one; as many as may be drafted.
        drafting: making the drafts, as a share of a plain step.
    """
    tokens = sorted([(chance, i) for i, of_one in enumerate(chances) for chance in of_one], reverse=True)
    expected = accumulate([chance for chance, _ in tokens[: len(added) - 1]], initial=float(len(chances)))
    rates = [emitted / (1 + share + drafting) for emitted, share in zip(expected, added, strict=False)]
    num_drafts = max(range(1, len(rates)), key=rates.__getitem__)
    lengths = [0] * len(chances)
    for _, i in tokens[:num_drafts]:
        lengths[i] += 1
    return Choice(lengths, rates[num_drafts] / len(chances))
