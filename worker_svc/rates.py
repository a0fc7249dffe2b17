"""How fast a worker computes, by the steps that it computed lately. Pure.

A step with enough tokens of prompts says how fast prompts are computed beside the decodes that came along, which do
not count: what waits is prompts. Any other says how fast answers come. The engine counts its steps in as they end, the
simulated worker those of a formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from worker_svc.batch import Work

# Weight of the past when a step's rate is counted in.
RATE_MEMORY: Final = 0.95
# Weight of a step when its seconds are.
STEP_WEIGHT: Final = 0.1
# Tokens of prompts in a step from which on its time says how fast prompts are computed. Fewer, as the rest of a prompt
# that was cached, take as long as one does (a worker that idled seemed to need a minute for what it computes in 0.1 s)
# and count only while nothing else was measured.
MIN_RATED_TOKENS: Final = 16


@dataclass(slots=True)
class Rate:
    """How much of something a second, the recent past weighing most, each step by its length."""

    amount: float = 0.0
    seconds: float = 0.0

    @property
    def per_s(self) -> float:
        """0 until something took time."""
        return self.amount / self.seconds if self.seconds else 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.amount = RATE_MEMORY * self.amount + amount
        self.seconds = RATE_MEMORY * self.seconds + seconds


@dataclass(slots=True)
class StepRates:
    """What steps say of a worker."""

    prefill: Rate = field(default_factory=Rate)  # tokens of prompts, in steps with any
    decode: Rate = field(default_factory=Rate)  # tokens that came of other steps
    step_s: float = 0.0  # of a step that decodes, which is what a stream waits for a token; 0 until there was one

    def add(self, work: Work, num_emitted: int, seconds: float, num_steps: int = 1) -> None:
        """Count a step in, or several that were alike, which weigh as much as one of their length.

        Args:
            work, num_emitted, seconds: what was computed, the tokens that came of it and what it took, of all of them.
        """
        if says_prefill_rate(work.num_new, is_measured=self.prefill.per_s > 0):
            self.prefill.add(work.num_new, seconds)
        else:
            self.decode.add(num_emitted, seconds)
        if not work.num_sequences:
            return
        mean = seconds / num_steps
        self.step_s = (1 - STEP_WEIGHT) * self.step_s + STEP_WEIGHT * mean if self.step_s else mean


def says_prefill_rate(num_new: int, is_measured: bool) -> bool:
    """Whether a step with so many tokens of prompts says how fast these are computed; `is_measured`: any has before."""
    return num_new >= MIN_RATED_TOKENS or (num_new > 0 and not is_measured)
