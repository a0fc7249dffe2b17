"""The gateway's Prometheus metrics: what clients experience. Observed once a request, not once a token."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Metrics:
    """Counters and histograms by model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "weft_requests", "Requests ended, by how.", ["model", "finish_reason"], registry=registry
        )
        self.http = Counter("weft_http_requests", "HTTP answers.", ["route", "status"], registry=registry)
        self.prompt_tokens = Counter("weft_prompt_tokens", "Prompt tokens.", ["model"], registry=registry)
        self.cached_tokens = Counter(
            "weft_prompt_tokens_cached", "Prompt tokens found in a cache.", ["model"], registry=registry
        )
        self.completion_tokens = Counter("weft_completion_tokens", "Tokens generated.", ["model"], registry=registry)
        self.ttft = Histogram(
            "weft_time_to_first_token_seconds",
            "From arrival to the first token.",
            ["model"],
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.tpot = Histogram(
            "weft_time_per_output_token_seconds",
            "Mean gap between the tokens of a request.",
            ["model"],
            buckets=_GAP_BUCKETS,
            registry=registry,
        )
        self.e2e = Histogram(
            "weft_e2e_request_latency_seconds",
            "From arrival to the last token.",
            ["model"],
            buckets=_E2E_BUCKETS,
            registry=registry,
        )
        self.prompt_lengths = Histogram(
            "weft_request_prompt_tokens",
            "Prompt tokens of a request.",
            ["model"],
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
