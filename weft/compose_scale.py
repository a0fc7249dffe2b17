"""`python -m weft.compose_scale`: scaling for docker compose, in the folder of the compose file.

It needs nothing but the `docker` command: the advice comes through `docker compose exec` from a scheduler's container,
so that no port of NATS must be open and no password be known here. What it starts has the variables of its own shell
and of `.env`, as with any `docker compose up`.

A container is drained by being stopped, which sends SIGTERM: unlike one that ended by itself it is not started again.
Workers are known by their host name, which is the beginning of the container's id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from weft import telemetry
from weft.errors import WeftError
from weft.exit_status import complain
from weft.messages import ScaleAdvice
from weft.replicas import Replica, plan_change
from weft.settings import ComposeScaleSettings, load

log = logging.getLogger(__name__)

ID_CHARS: Final = 12  # of a container's id that are its host name
LISTEN: Final = ("docker", "compose", "exec", "-T", "scheduler", "python", "-m", "weft.advice")
WHERE: Final = "run this where `docker compose ps` works: beside the compose file, with the engine up"
MAX_LINE_BYTES: Final = 2**20  # of advice
# Before a command that failed is tried again.
RETRY_S: Final = 2.0
# Advice comes twice a second; so long without any, somebody should know.
SILENCE_S: Final = 10.0
# Containers that need no change are counted so often: to ask compose takes a tenth of a second of CPU, or more.
RECOUNT_S: Final = 5.0


class CommandFailed(WeftError):
    """A docker command failed; the message is what it wrote last."""


def main(argv: Sequence[str]) -> int:
    """Run until interrupted; returns the exit status."""
    prog = "compose_scale"
    try:
        settings = load(ComposeScaleSettings, argv, os.environ, prog=prog)
        telemetry.start_logging("info", prog)
        asyncio.run(_run(settings))
    except KeyboardInterrupt:
        return 0
    except WeftError as error:
        return complain(prog, error)
    return 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What carries advice out: containers to drain, or a command; neither if there are as many as there should be."""

    leaving: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def plan(staying: Sequence[str], num_leaving: int, advice: ScaleAdvice, service: str) -> Plan:
    """How to get to as many workers as are advised.

    Args:
        staying: ids of the containers that run and do not drain, as compose lists them: about oldest first.
        num_leaving: containers that drain, or have and are not removed yet.
    """
    assert advice.target is not None
    hosts = [container[:ID_CHARS] for container in staying]
    order = [host for worker in advice.drain for host in worker.split("-") if host in hosts]
    replicas = [Replica(host, host in order, float(number)) for number, host in enumerate(hosts)]
    change = plan_change(replicas, advice.target, order)
    if not change.num_more:
        return Plan(change.leaving)
    # Compose counts those that leave, too.
    size = f"{service}={advice.target + num_leaving}"
    return Plan(command=("docker", "compose", "up", "--detach", "--no-deps", "--no-recreate", "--scale", size, service))


async def _run(settings: ComposeScaleSettings) -> None:
    """Carry out the newest advice, again and again. Raises CommandFailed if compose cannot be asked at all."""
    workers = Workers(settings.service)
    try:
        await _execute("docker", "compose", "version")
        await workers.count()
    except CommandFailed as error:
        raise CommandFailed(f"{error.message} ({WHERE})") from error
    log.info("following the schedulers", extra={"service": settings.service})
    newest: asyncio.Queue[ScaleAdvice] = asyncio.Queue(maxsize=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(_listen(settings.scaled_model, newest), name="listen")
        while True:
            advice = await newest.get()
            try:
                await workers.apply(advice, group)
            except CommandFailed as error:
                log.warning("failed, and is tried again", extra={"reason": error.message})
                await asyncio.sleep(RETRY_S)


async def _listen(model: str, newest: asyncio.Queue[ScaleAdvice]) -> None:
    """Keep the newest advice for a model there; for any model if none is named."""
    told = ""
    while True:
        try:
            async for advice in _heard():
                if told:
                    log.info("advice comes again")
                    told = ""
                if advice.target is not None and model in ("", advice.model):
                    if newest.full():
                        newest.get_nowait()
                    newest.put_nowait(advice)
        except CommandFailed as error:
            # A mesh may be down for long.
            if error.message != told:
                log.warning("no advice; asking again", extra={"reason": error.message})
            told = error.message
        await asyncio.sleep(RETRY_S)


async def _heard() -> AsyncIterator[ScaleAdvice]:
    """What the schedulers advise. Raises CommandFailed when it cannot be heard any longer."""
    process = await _start(LISTEN, stdin=PIPE)
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read(), name="what docker complains of")
    lines = aiter(process.stdout)
    while line := await _next(lines):
        try:
            yield msgspec.json.decode(line, type=ScaleAdvice)
        except msgspec.DecodeError as error:
            process.kill()
            raise CommandFailed(f"the scheduler's image is of another version of Weft: {error}") from error
    await process.wait()
    raise CommandFailed(f"{' '.join(LISTEN)}: {_last_line(await errors)}; is the mesh up?")


async def _next(lines: AsyncIterator[bytes]) -> bytes:
    """The next line, late or not; empty at the end."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(lines, b"")
    except TimeoutError:
        log.warning("the schedulers advise nothing: was WEFT_SCALE set when they were started?")
        return await anext(lines, b"")


class Workers:
    """The containers of a service."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._leaving: set[str] = set()
        self._settled: int | None = None  # the target of which `count` said that it is reached
        self._counted_at = 0.0

    async def count(self) -> list[str]:
        """Ids of those that run. Raises CommandFailed."""
        self._counted_at = time.monotonic()
        return (await _execute("docker", "compose", "ps", "--quiet", self._service)).split()

    async def apply(self, advice: ScaleAdvice, group: asyncio.TaskGroup) -> None:
        """Start workers, or let some drain in tasks of `group`. Raises CommandFailed."""
        if advice.target == self._settled and time.monotonic() - self._counted_at < RECOUNT_S:
            return
        self._settled = None
        # One that goes while compose counts may be counted still.
        leaving = frozenset(self._leaving)
        staying = [container for container in await self.count() if container[:ID_CHARS] not in leaving]
        found = plan(staying, len(self._leaving), advice, self._service)
        facts = {"target": advice.target, "reason": advice.reason}
        if found.command:
            log.info("scaling up", extra=facts | {"command": " ".join(found.command)})
            await _execute(*found.command)
        for container in found.leaving:
            log.info("scaling down", extra=facts | {"container": container})
            self._leaving.add(container)
            group.create_task(self._drain(container), name=f"drain {container}")
        if not found.command and not found.leaving:
            self._settled = advice.target

    async def _drain(self, container: str) -> None:
        began = time.monotonic()
        try:
            await _execute("docker", "stop", container)
            # Or the next `up` would count it and start it again.
            await _execute("docker", "rm", container)
            log.info("drained", extra={"container": container, "seconds": round(time.monotonic() - began, 1)})
        except CommandFailed as error:
            log.warning("failed, and is tried again", extra={"reason": error.message})
        finally:
            self._leaving.discard(container)


async def _execute(*command: str) -> str:
    """What it wrote. Raises CommandFailed."""
    process = await _start(command)
    output, errors = await process.communicate()
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)}: {_last_line(errors)}")
    return output.decode()


async def _start(command: Sequence[str], stdin: int = asyncio.subprocess.DEVNULL) -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=stdin, stdout=PIPE, stderr=PIPE, limit=MAX_LINE_BYTES
        )
    except FileNotFoundError as error:
        raise CommandFailed(f"there is no command `{command[0]}`") from error
    except OSError as error:
        raise CommandFailed(f"{command[0]}: {error.strerror or error}") from error


def _last_line(errors: bytes) -> str:
    """The last that says something; docker ends some complaints by naming its help."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines()]
    return next(
        (line for line in reversed(lines) if line and not line.startswith(("Run '", "See '"))), "it said nothing"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
