"""One table of hard limits, checked at the edge and again wherever a message is decoded.

They bound what one client can ask of the mesh; what a deployment wants to allow below them is a setting.
"""

from __future__ import annotations

from typing import Final

# HTTP edge
MAX_BODY_BYTES: Final = 8 * 1024 * 1024
MAX_PROMPTS: Final = 256  # prompts in one /v1/completions call
MAX_CHOICES: Final = 64  # n, for one prompt
MAX_STREAMS: Final = 1024  # prompts times n, in one call
MAX_CHAT_MESSAGES: Final = 4096
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGIT_BIAS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_NAME_CHARS: Final = 256  # model names, tenants, users

# The bus
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024  # equals max_payload in weft/nats.conf
MAX_PROMPT_TOKENS: Final = 1_000_000
MAX_TOKEN_ID: Final = 2**31 - 1
MAX_FRAME_ROWS: Final = 65_536
MAX_IDS_PER_MESSAGE: Final = 500_000  # block hashes in one message
MAX_PRIORITY: Final = 1000
MAX_WORKERS: Final = 10_000  # of a model, that scaling may ask for
MAX_PLACED: Final = 1024  # decisions in one message
MAX_SCORES: Final = 8  # candidates that a scheduler's decision lists
