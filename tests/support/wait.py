"""Waiting for something to become true, without sleeping blindly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], *, timeout_s: float = 10.0, every_s: float = 0.005) -> None:
    """Return when `condition()` is true. Raises TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # conditions here are of other processes, which set no event
            await asyncio.sleep(every_s)
