"""What schedulers advise, as lines for whoever cannot reach NATS."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import msgspec

from tests.support import nats
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.messages import ScaleAdvice
from weft.settings import MeshSettings

ADVICE = ScaleAdvice("s", "tales", target=2, reason="9 wait", drain=["worker-a-1-b"])


async def test_advice_is_written_a_line_each_until_the_input_ends(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "weft.advice", stdin=PIPE, stdout=PIPE, env=os.environ | {"WEFT_NATS_URL": server.url}
        )
        assert process.stdin is not None and process.stdout is not None
        bus = Bus(MeshSettings(nats_url=server.url), "scheduler", "s")
        await bus.connect()
        line = asyncio.create_task(process.stdout.readline())
        try:
            # It may not listen yet: advice comes again and again.
            await until(lambda: bus.tell(subjects.scale("tales"), ADVICE) or line.done())
            process.stdin.close()
            assert await process.wait() == 0
        finally:
            await bus.close()
    assert msgspec.json.decode(await line, type=ScaleAdvice) == ADVICE


async def test_without_nats_it_says_so_and_fails() -> None:
    environ = os.environ | {"WEFT_NATS_URL": "nats://127.0.0.1:1", "WEFT_STARTUP_S": "0.1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "weft.advice", stdin=PIPE, stderr=PIPE, env=environ
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.startswith(b"advice: no NATS server at nats://127.0.0.1:1")
