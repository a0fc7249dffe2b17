"""`weft top`, `weft drain` and `weft policy`: what an operator sees of a mesh on its bus, and does to it.

Without `--nats-url` they reach the `weft up` of this machine, which leaves word in its data folder.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from weft import data_folder, subjects
from weft.bus import Bus
from weft.errors import SettingsError, WeftError
from weft.exit_status import complain
from weft.messages import HEARTBEAT_INTERVAL_S, Control, ControlReply, Heartbeat, WorkerStatus
from weft.roster import Member, Roster
from weft.settings import (
    DrainSettings,
    MeshSettings,
    OperatorSettings,
    PolicySettings,
    TopSettings,
    load,
    load_with_words,
)

# Everybody has been heard by then.
LISTEN_S: Final = 2.5 * HEARTBEAT_INTERVAL_S
REDRAW_S: Final = 0.5
ANSWER_S: Final = 5.0
CLEAR: Final = "\x1b[H\x1b[J"
HEADINGS: Final = ("INSTANCE", "STATE", "UP", "RUNNING", "WAITING", "FREE BLOCKS", "PREFILL/S", "DECODE/S", "MODELS")
T = TypeVar("T")


def top(argv: Sequence[str]) -> int:
    """Show every instance: again and again on a terminal, once elsewhere."""
    try:
        settings = load(TopSettings, argv, os.environ, prog="weft top")
        asyncio.run(_top(settings))
    except WeftError as error:
        return complain("weft top", error)
    return 0


def drain(argv: Sequence[str]) -> int:
    """`drain INSTANCE`: let it finish its work and end; returns when it has."""
    try:
        settings, words = load_with_words(DrainSettings, argv, os.environ, prog="weft drain INSTANCE")
        if len(words) != 1:
            raise SettingsError("which instance? `weft top` lists them: weft drain INSTANCE")
        asyncio.run(_drain(settings.operator, words[0]))
    except WeftError as error:
        return complain("weft drain", error)
    return 0


def policy(argv: Sequence[str]) -> int:
    """`policy [FAMILY=NAME ...]`: switch policies of every scheduler while they run, or only say what they are."""
    try:
        settings, words = load_with_words(PolicySettings, argv, os.environ, prog="weft policy [FAMILY=NAME ...]")
        asyncio.run(_policy(settings, _read_changes(words)))
    except WeftError as error:
        return complain("weft policy", error)
    return 0


class Observer:
    """Who is there and how loaded they are, from what they say of themselves."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.roster = Roster()
        self.statuses: dict[str, WorkerStatus] = {}
        self.changed = asyncio.Event()

    async def start(self) -> None:
        await self.bus.connect()
        await self.bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_beat)
        await self.bus.on(subjects.STATUS_ALL, WorkerStatus, self._on_status)
        await self.bus.flush()

    def members(self) -> list[Member]:
        self.roster.expire(time.monotonic())
        found = [member for role in subjects.PERMISSIONS for member in self.roster.members(role)]
        return sorted(found, key=lambda member: (list(subjects.PERMISSIONS).index(member.role), member.instance))

    def find(self, instance: str) -> Member | None:
        return next((member for member in self.members() if member.instance == instance), None)

    def _on_beat(self, beat: Heartbeat) -> None:
        self.roster.apply(beat, time.monotonic())
        self.changed.set()

    def _on_status(self, status: WorkerStatus) -> None:
        self.statuses[status.worker] = status


def table(members: Sequence[Member], statuses: Mapping[str, WorkerStatus], now: float) -> str:
    """One line an instance. Pure; `now` is wall time in seconds."""
    rows = [HEADINGS, *(_row(member, statuses.get(member.instance), now) for member in members)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _row(member: Member, status: WorkerStatus | None, now: float) -> tuple[str, ...]:
    # An epoch is the microsecond in which the life began.
    head = (member.instance, member.state, _duration(now - member.epoch / 1e6))
    models = ",".join(member.models) or "-"
    if status is None or status.worker_epoch != member.epoch:
        return (*head, "-", "-", "-", "-", "-", models)
    return (
        *head,
        str(status.num_running),
        str(status.num_waiting),
        f"{status.num_free_blocks}/{status.num_blocks}",
        f"{status.prefill_tokens_per_s:.0f}",
        f"{status.decode_tokens_per_s:.0f}",
        models,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, seconds):.0f}s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.0f}h"


async def _top(settings: TopSettings) -> None:
    observer = Observer(_bus(settings.operator))
    try:
        await observer.start()
        await asyncio.sleep(LISTEN_S)
        live = sys.stdout.isatty() and not settings.once
        while True:
            text = table(observer.members(), observer.statuses, time.time())
            sys.stdout.write((CLEAR if live else "") + text)
            sys.stdout.flush()
            if not live:
                return
            await asyncio.sleep(REDRAW_S)
    finally:
        await observer.bus.close()


async def _drain(settings: OperatorSettings, instance: str) -> None:
    observer = Observer(_bus(settings))
    try:
        await observer.start()
        member = await _wait(observer, instance)
        await observer.bus.ask(
            subjects.control(member.role, instance), Control("drain"), ControlReply, timeout_s=ANSWER_S
        )
        sys.stdout.write(f"{instance} is draining\n")
        sys.stdout.flush()
        while (now := observer.find(instance)) is not None and now.epoch == member.epoch:
            observer.changed.clear()
            await observer.changed.wait()
        sys.stdout.write(f"{instance} has drained\n")
    finally:
        await observer.bus.close()


def _read_changes(words: Sequence[str]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for word in words:
        family, sign, name = word.partition("=")
        if not (family and sign and name):
            raise SettingsError(f"{word!r} is not FAMILY=NAME, as in order=srpt")
        if family in changes:
            raise SettingsError(f"{family} is given twice")
        changes[family] = name
    return changes


async def _policy(settings: PolicySettings, changes: Mapping[str, str]) -> None:
    observer = Observer(_bus(settings.operator))
    try:
        await observer.start()
        await asyncio.sleep(LISTEN_S)
        members = observer.members()
        schedulers = [member.instance for member in members if member.role == "scheduler"]
        if not schedulers:
            raise SettingsError("no scheduler is there")
        models = sorted({model for member in members for model in member.models})
        if settings.model and settings.model not in models:
            raise SettingsError(
                f"--model: nobody serves {settings.model!r}; there is {', '.join(models) or 'no model'}"
            )
        for instance in schedulers:
            found = await _policies_of(observer.bus, instance, settings.model, changes)
            sys.stdout.write(_policy_line(instance, settings.model or "all models", found))
            # What was said of one model alone.
            for model in [] if settings.model else models:
                own = await _policies_of(observer.bus, instance, model, {})
                if own != found:
                    sys.stdout.write(_policy_line(instance, model, own))
    finally:
        await observer.bus.close()


async def _policies_of(bus: Bus, scheduler: str, model: str, changes: Mapping[str, str]) -> dict[str, str]:
    """Those of a model, or of all if it is empty, after changes."""
    control = Control("policies", dict(changes), model)
    reply = await bus.ask(subjects.control("scheduler", scheduler), control, ControlReply, timeout_s=ANSWER_S)
    return reply.policies


def _policy_line(scheduler: str, model: str, policies: Mapping[str, str]) -> str:
    return "  ".join([scheduler, model, *(f"{family}={name}" for family, name in policies.items())]) + "\n"


async def _wait(observer: Observer, instance: str) -> Member:
    try:
        async with asyncio.timeout(LISTEN_S):
            while (member := observer.find(instance)) is None:
                observer.changed.clear()
                await observer.changed.wait()
            return member
    except TimeoutError:
        there = ", ".join(member.instance for member in observer.members()) or "nobody"
        raise SettingsError(f"no instance {instance!r}; there is {there}") from None


def _bus(settings: OperatorSettings) -> Bus:
    mesh = MeshSettings(
        nats_url=settings.nats_url, nats_user=settings.nats_user, nats_password=settings.nats_password, startup_s=5.0
    )
    if not settings.nats_url:
        folder = data_folder.at(settings.data_path)
        run_file = data_folder.read_run_file(folder)
        if run_file is None:
            raise SettingsError(f"no `weft up` runs in {folder.root}; start one, or say --nats-url or --data-path")
        mesh = MeshSettings(
            nats_url=run_file.nats_url,
            nats_user=run_file.nats_user,
            nats_password=run_file.nats_password,
            startup_s=5.0,
        )
    return Bus(mesh, "supervisor", f"operator-{os.getpid()}")
