"""What `weft up` writes for its NATS server, and reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft import nats_server, subjects
from weft.data_folder import DataFolder
from weft.messages import Role

PASSWORDS: dict[Role, str] = dict.fromkeys(subjects.PERMISSIONS, "secret")


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    (tmp_path / "run").mkdir()
    return DataFolder(tmp_path)


def test_server_is_told_of_a_configuration_that_only_its_owner_may_read(folder: DataFolder) -> None:
    nats_server.write_config(folder, PASSWORDS, -1)
    nats_server.write_config(folder, PASSWORDS, 4222)
    path = Path(nats_server.make_spec(folder).argv[-1])
    assert 'listen: "127.0.0.1:4222"' in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_port_is_known_when_the_server_has_said_it(folder: DataFolder) -> None:
    said = folder.run / "nats-server_17.ports"
    assert nats_server.read_port(folder, 17) is None
    said.write_text('{"nats": [')
    assert nats_server.read_port(folder, 17) is None
    said.write_text(json.dumps({"nats": ["nats://127.0.0.1:40123"]}))
    assert nats_server.read_port(folder, 17) == 40123
    assert nats_server.read_port(folder, 18) is None
