"""`python -m weft.compose_scale`: scaling for docker compose, in the folder of the compose file.

It needs to reach the project's NATS and the `docker` command. A container is drained by being stopped, which sends
SIGTERM: unlike one that ended by itself it is not started again. Workers are known by their host name, which is the
beginning of the container's id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from weft import subjects, telemetry
from weft.bus import Bus
from weft.errors import WeftError
from weft.exit_status import complain
from weft.messages import ScaleAdvice
from weft.replicas import Replica, plan_change
from weft.settings import ComposeScaleSettings, load

log = logging.getLogger(__name__)

ID_CHARS = 12  # of a container's id that are its host name


class CommandFailed(WeftError):
    """A docker command failed; the message is what it wrote last."""


def main(argv: Sequence[str]) -> int:
    """Run until interrupted or until a command fails; returns the exit status."""
    prog = "compose_scale"
    try:
        settings = load(ComposeScaleSettings, argv, os.environ, prog=prog)
        telemetry.start_logging(settings.mesh.log_level, prog)
        asyncio.run(_run(settings))
    except KeyboardInterrupt:
        return 0
    except WeftError as error:
        return complain(prog, error)
    return 0


def plan_commands(containers: Sequence[str], advice: ScaleAdvice, service: str) -> list[list[str]]:
    """The docker commands that carry the advice out, one after the other.

    Args:
        containers: ids of those that run, oldest first.
    """
    assert advice.target is not None
    ids = {container[:ID_CHARS]: container for container in containers}
    order = [ids[host] for worker in advice.drain for host in worker.split("-") if host in ids]
    replicas = [Replica(name, name in order, float(number)) for number, name in enumerate(containers)]
    change = plan_change(replicas, advice.target, order)
    if change.num_more:
        size = f"{service}={advice.target}"
        return [["docker", "compose", "up", "--detach", "--no-deps", "--no-recreate", "--scale", size, service]]
    if not change.leaving:
        return []
    # Removed, or the next `up` would count them and start them again.
    return [["docker", "stop", *change.leaving], ["docker", "rm", *change.leaving]]


async def _run(settings: ComposeScaleSettings) -> None:
    """Carry out the newest advice, again and again. Raises CommandFailed."""
    bus = Bus(settings.mesh, "supervisor", f"compose-{os.getpid()}")
    advised: asyncio.Queue[ScaleAdvice] = asyncio.Queue()
    await bus.connect()
    try:
        await bus.on(subjects.SCALE_ALL, ScaleAdvice, advised.put_nowait)
        await bus.flush()
        while True:
            advice = await advised.get()
            # What came while the last one was carried out is out of date, but for the newest.
            while not advised.empty():
                advice = _newer(advice, advised.get_nowait(), settings.scaled_model)
            if advice.target is not None and settings.scaled_model in ("", advice.model):
                await _carry_out(advice, settings.service)
    finally:
        await bus.close()


def _newer(before: ScaleAdvice, advice: ScaleAdvice, model: str) -> ScaleAdvice:
    return advice if advice.target is not None and model in ("", advice.model) else before


async def _carry_out(advice: ScaleAdvice, service: str) -> None:
    listed = await _execute(["docker", "compose", "ps", "--quiet", service])
    for command in plan_commands(listed.split(), advice, service):
        log.info("scaling", extra={"target": advice.target, "reason": advice.reason, "command": " ".join(command)})
        await _execute(command)


async def _execute(command: Sequence[str]) -> str:
    """What it wrote. Raises CommandFailed."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise CommandFailed(f"{command[0]}: {error.strerror or error}") from error
    output, errors = await process.communicate()
    if process.returncode:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise CommandFailed(f"{' '.join(command)}: {last}")
    return output.decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
