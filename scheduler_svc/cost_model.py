"""How long work takes on a worker, as a formula that is fitted to measurements. Pure.

A step takes
    overhead + prefill of n tokens after c cached ones: chunk + token * n + attention * (n c + n^2 / 2)
             + decode of a batch: context * (tokens of all contexts) + sequence * (sequences)
seconds, which is DistServe's form (Zhong et al. 2024, appendix A: prefill a + b sum n + c sum n^2, decode
a' + b' context + c' batch) with what is cached left out of the work. Admission and routing ask for its parts, the
simulator for whole steps (`lab.simulator.fit.step_s`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CostModel:
    """Seconds for each unit of work. All 0 until something was measured."""

    overhead_s: float = 0.0  # of a step
    token_s: float = 0.0  # of a prefilled token
    attention_s: float = 0.0  # of a prefilled token that sees a token
    context_s: float = 0.0  # of a token that a decode sees
    sequence_s: float = 0.0  # of a decode
    chunk_s: float = 0.0  # of a prompt, or a piece of one, whatever its length

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Seconds for the tokens of a prompt that are not cached, without the overhead of steps and chunks."""
        new = max(0, num_tokens - num_cached)
        return self.token_s * new + self.attention_s * new * (num_cached + 0.5 * new)

    def decode_s(self, num_sequences: int, num_context_tokens: float) -> float:
        """Seconds for one token of each sequence, without a step's overhead."""
        return self.sequence_s * num_sequences + self.context_s * num_context_tokens

    def follow(self, prefill_tokens_per_s: float, step_s: float) -> None:
        """Take what workers measure lately for constant, for want of a calibration; 0 is not measured. Mutates self."""
        if prefill_tokens_per_s:
            self.token_s = 1 / prefill_tokens_per_s
        if step_s:
            self.overhead_s = step_s


@dataclass(slots=True)
class Transfer:
    """How long KV takes to get to a worker that does not have it."""

    block_s: float | None = None  # seconds of a block; None if it cannot be had, or nobody has measured it
