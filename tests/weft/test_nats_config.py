"""The NATS configuration against a real server: what a role may do, it can; what it may not, it is denied."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import nats
from weft import nats_config, subjects
from weft.bus import Bus
from weft.errors import SettingsError, Unavailable
from weft.messages import Heartbeat, Role
from weft.settings import ALL_SETTINGS, MeshSettings, declared

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ROLES = list(subjects.PERMISSIONS)
# Digits alone, and a quote: what a generator of passwords may come up with.
PASSWORDS: dict[Role, str] = {role: f'12{index}"34' for index, role in enumerate(ROLES)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nats.NatsServer]:
    folder = tmp_path_factory.mktemp("nats")
    config = nats_config.for_embedded(PASSWORDS, port=-1, ports_folder=str(folder))
    with nats.running(folder, config) as running:
        yield running


def bus_of(server: nats.NatsServer, role: Role, password: str) -> Bus:
    return Bus(MeshSettings(nats_url=server.url, nats_user=role, nats_password=password, startup_s=2), role, "i")


async def try_subjects(server: nats.NatsServer, role: Role, publish: list[str], subscribe: list[str]) -> None:
    """Raises SettingsError if one of them is denied."""
    bus = bus_of(server, role, PASSWORDS[role])
    await bus.connect()
    try:
        for subject in subscribe:
            await bus.on(subject, Heartbeat, lambda beat: None)
        for subject in publish:
            bus.publish(subject, b"")
        await bus.flush()
    finally:
        await bus.close()


def concrete(pattern: str) -> str:
    return pattern.replace("*", "x").replace(">", "x.y")


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_can_do_all_it_may(server: nats.NatsServer, role: Role) -> None:
    may = subjects.PERMISSIONS[role]
    await try_subjects(server, role, [concrete(pattern) for pattern in may.publish], list(may.subscribe))


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_cannot_read_another_roles_inbox(server: nats.NatsServer, role: Role) -> None:
    for other in ROLES:
        if other != role:
            with pytest.raises(SettingsError, match="denies"):
                await try_subjects(server, role, [], [f"_INBOX.{other}.>"])


@pytest.mark.parametrize(
    ("role", "publish", "subscribe"),
    [
        ("worker", "weft.v1.cancel", None),
        ("worker", "weft.v1.tokenize.m", None),
        ("worker", None, "weft.v1.gateway.>"),
        ("cache", "weft.v1.gateway.g.frames", None),
        ("gateway", "weft.v1.worker.w.assign", None),
        ("tokenizer", None, "weft.v1.schedule.*"),
        ("scheduler", "weft.v1.gateway.g.frames", None),
        ("gateway", "weft.v1.alive.worker.w", None),
        ("gateway", None, ">"),
    ],
)
async def test_a_role_cannot_do_more(
    server: nats.NatsServer, role: Role, publish: str | None, subscribe: str | None
) -> None:
    with pytest.raises(SettingsError, match="denies"):
        await try_subjects(server, role, [publish] if publish else [], [subscribe] if subscribe else [])


@pytest.mark.parametrize(("user", "password"), [("worker", "wrong"), ("nobody", "x"), ("", "")])
async def test_strangers_are_refused(server: nats.NatsServer, user: str, password: str) -> None:
    mesh = MeshSettings(nats_url=server.url, nats_user=user, nats_password=password, startup_s=0.3)
    bus = Bus(mesh, "worker", "i")
    with pytest.raises(Unavailable, match="Authorization Violation"):
        await bus.connect()
    await bus.close()


def test_file_for_compose_is_what_the_permissions_say() -> None:
    assert (ROOT / "weft/nats.conf").read_text() == nats_config.for_compose(), "run `python -m weft.nats_config`"


def test_server_accepts_the_file_for_compose_with_passwords_as_compose_gives_them() -> None:
    environ = dict.fromkeys(COMPOSE["services"]["nats"]["environment"], "'12345'")
    check = subprocess.run(
        [nats.SERVER, "-t", "-c", ROOT / "weft/nats.conf"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr


def test_compose_gives_server_and_service_the_same_password() -> None:
    server = COMPOSE["services"]["nats"]["environment"]
    for name, service in COMPOSE["services"].items():
        if name != "nats":
            role = service["environment"]["WEFT_NATS_USER"]
            assert server[f"NATS_PASSWORD_{role.upper()}"] == f"'{service['environment']['WEFT_NATS_PASSWORD']}'"


def test_compose_passes_every_setting_of_a_service_on() -> None:
    for cls in ALL_SETTINGS:
        role = cls.__name__.removesuffix("Settings").lower()
        for name in [name for name in COMPOSE["services"] if name.split("-")[0] == role]:
            given = {variable for variable in COMPOSE["services"][name]["environment"] if variable.startswith("WEFT_")}
            # An instance is named after its container, and sockets are handed on by `weft up` only.
            assert given == {item.variable for item in declared(cls)} - {"WEFT_INSTANCE", "WEFT_LISTEN_FDS"}, name


def test_compose_says_nothing_twice() -> None:
    # PyYAML takes the last of two; docker compose takes neither.
    for block in re.split(r"\n(?! *WEFT_)", (ROOT / "docker-compose.yml").read_text()):
        names = re.findall(r"^ *(WEFT_\w+):", block, re.MULTILINE)
        assert len(names) == len(set(names))


def test_compose_publishes_the_gateway_only_and_checks_everybody() -> None:
    for name, service in COMPOSE["services"].items():
        assert ("ports" in service) == (name == "gateway")
        assert service["init"] and service["restart"] and service["stop_grace_period"] and service["healthcheck"]


def test_compose_keeps_compiled_kernels_where_workers_look_for_them() -> None:
    folders = re.findall(r"_CACHE_DIR=(\S+)", (ROOT / "Dockerfile").read_text())
    workers = [service for name, service in COMPOSE["services"].items() if name.split("-")[0] == "worker"]
    assert folders and workers
    for service in workers:
        (kept,) = (volume.split(":")[1] for volume in service["volumes"] if volume.startswith("kernels:"))
        assert all(f"{folder}/".startswith(f"{kept}/") for folder in folders)


def test_embedded_file_quotes_whatever_a_password_holds() -> None:
    text = nats_config.for_embedded(PASSWORDS, port=1, ports_folder="/a folder")
    assert f"password: {json.dumps(PASSWORDS['worker'])}" in text
    assert 'ports_file_dir: "/a folder"' in text
