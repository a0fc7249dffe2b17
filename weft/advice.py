"""`python -m weft.advice`: what the schedulers advise, a line of JSON each, until its input ends.

For whoever starts workers and cannot reach NATS: it runs where a scheduler runs, with that one's settings. A process
that was started in a container outlives whoever started it, but its input does not.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import msgspec

from weft import subjects
from weft.bus import Bus
from weft.errors import WeftError
from weft.exit_status import complain
from weft.messages import ScaleAdvice
from weft.settings import AdviceSettings, load


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        asyncio.run(_run(load(AdviceSettings, argv, os.environ, prog="advice")))
    except KeyboardInterrupt:
        return 0
    except WeftError as error:
        return complain("advice", error)
    return 0


async def _run(settings: AdviceSettings) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _read, ended)
    # A scheduler's rights are enough to listen.
    bus = Bus(settings.mesh, "scheduler", f"advice-{os.getpid()}")
    await bus.connect()
    try:
        await bus.on(subjects.SCALE_ALL, ScaleAdvice, lambda advice: _write(advice, ended))
        await ended.wait()
    finally:
        await bus.close()


def _read(ended: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        ended.set()


def _write(advice: ScaleAdvice, ended: asyncio.Event) -> None:
    try:
        os.write(sys.stdout.fileno(), msgspec.json.encode(advice) + b"\n")
    except BrokenPipeError:
        ended.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
