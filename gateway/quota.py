"""Whether a tenant has tokens left: a bucket for each tenant with a quota, filled by the minute. Pure.

A call takes what it may come to as it begins: its prompts, estimated where they are text, and `max_tokens` of each
choice if it says so. As it ends it gives back what it did not use, or takes what it used beyond that.
Invariant: with right estimates, what a tenant uses in t seconds is at most its burst and t times its rate, but for a
single call that alone is larger, which is taken when the bucket is full, and paid off afterwards.
Source: OpenAI's rate limits, which count the same two things; the token bucket (Turner 1986).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, assert_never

from gateway.openai import Call
from weft.errors import QuotaExceeded
from weft.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from weft.tenants import Tenant, Tenants

# OpenAI's rule of thumb for English.
BYTES_PER_TOKEN: Final = 4


class TokenBucket:
    """Tokens that a tenant has now; below 0 after a call that used more than was expected."""

    def __init__(self, tokens_per_minute: int, burst: int, now: float) -> None:
        self.size = burst
        self._rate_tokens_per_s = tokens_per_minute / 60
        self._level = float(burst)
        self._filled_at = now

    def level(self, now: float) -> float:
        """Tokens there are. Mutates self."""
        filled = self._level + max(0.0, now - self._filled_at) * self._rate_tokens_per_s
        self._level = min(float(self.size), filled)
        self._filled_at = max(now, self._filled_at)
        return self._level

    def seconds_to(self, level: float, now: float) -> float:
        """Until there are so many; sooner if calls give some back."""
        return max(0.0, (level - self.level(now)) / self._rate_tokens_per_s)

    def take(self, num_tokens: float, now: float) -> None:
        """Take tokens, or give some back if the number is negative."""
        self._level = self.level(now) - num_tokens


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a running call has taken."""

    bucket: TokenBucket
    num_tokens: int

    def settle(self, num_used: int, now: float) -> None:
        """The call has ended."""
        self.bucket.take(num_used - self.num_tokens, now)


class Quotas:
    """The buckets of one gateway."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._buckets: dict[str, TokenBucket] = {}

    def reserve(self, tenant: str, call: Call, max_model_len: int, now: float) -> Reservation | None:
        """Take what a call may come to; None if its tenant has no quota.

        Raises:
            QuotaExceeded: there is not so much; says when there will be.
        """
        bucket = self._bucket(tenant, now)
        if bucket is None:
            return None
        num_tokens = expected_tokens(call, max_model_len)
        # What is larger than the bucket waits for all of it.
        wait_s = bucket.seconds_to(min(num_tokens, bucket.size), now)
        if wait_s > 0:
            raise QuotaExceeded(
                f"Rate limit reached for tokens: this request may take {num_tokens} and "
                f"{max(0, math.floor(bucket.level(now)))} are left of {bucket.size}; try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        bucket.take(num_tokens, now)
        return Reservation(bucket, num_tokens)

    def headers(self, tenant: str, now: float) -> dict[str, str]:
        """What OpenAI says of a quota in every answer; nothing where there is none."""
        bucket = self._bucket(tenant, now)
        if bucket is None:
            return {}
        return {
            "x-ratelimit-limit-tokens": str(bucket.size),
            "x-ratelimit-remaining-tokens": str(max(0, math.floor(bucket.level(now)))),
            "x-ratelimit-reset-tokens": _duration(bucket.seconds_to(bucket.size, now)),
        }

    def _bucket(self, name: str, now: float) -> TokenBucket | None:
        tenant: Tenant = self._tenants.of(name)
        if tenant.tokens_per_minute is None:
            return None
        if name not in self._buckets:
            burst = tenant.burst or tenant.tokens_per_minute
            self._buckets[name] = TokenBucket(tenant.tokens_per_minute, burst, now)
        return self._buckets[name]


def expected_tokens(call: Call, max_model_len: int) -> int:
    """What a call may come to, as far as it says."""
    num_new = min(call.sampling.max_tokens or 0, max_model_len) * call.n * len(call.prompts)
    return max(1, sum(map(_prompt_tokens, call.prompts)) + num_new)


def _prompt_tokens(prompt: Prompt) -> int:
    match prompt:
        case TokenPrompt():
            return len(prompt.token_ids) // 4
        case TextPrompt():
            return _text_tokens(prompt.text)
        case ChatPrompt():
            return sum(_text_tokens(message.content) for message in prompt.messages)
        case _:
            assert_never(prompt)


def _text_tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def _duration(seconds: float) -> str:
    """As OpenAI writes one: `6m0s`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
