"""The NATS server's configuration, written from `subjects.PERMISSIONS`: one user a role, each with its allow-lists.

`weft up` renders it with passwords of its own and a free port; compose mounts `nats.conf`, which is this module's
`for_compose()` (`python -m weft.nats_config` prints it, a test compares). Pure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Final

from weft import subjects
from weft.messages import Role

# Equals limits.MAX_MESSAGE_BYTES: NATS counts an MB as 2**20 bytes.
MAX_PAYLOAD: Final = "8MB"
# A client proves who it is within this; a process that starts on a busy machine may be slow to.
AUTHORIZATION_TIMEOUT_S: Final = 20

_COMPOSE_HEAD: Final = """\
# NATS for docker-compose.yml. Written by `python -m weft.nats_config` from weft/subjects.py; do not edit.
# Passwords come from the environment; put quotes around the value ('"secret"'), or NATS reads digits as a number.
"""


def for_compose() -> str:
    """The file that compose mounts: every address of the container, passwords from `NATS_PASSWORD_<ROLE>`."""
    passwords: dict[Role, str] = {role: f"$NATS_PASSWORD_{role.upper()}" for role in subjects.PERMISSIONS}
    # Monitoring is for the container's own health check: it shows who is connected, so nobody else may read it.
    return _COMPOSE_HEAD + _render(passwords, ['listen: "0.0.0.0:4222"', 'http: "127.0.0.1:8222"'])


def for_embedded(passwords: Mapping[Role, str], *, port: int, ports_folder: str) -> str:
    """A server for this machine alone.

    Args:
        port: -1 for any free one; the server then says which in a file `nats-server_<pid>.ports` in `ports_folder`.
    """
    quoted = {role: json.dumps(password) for role, password in passwords.items()}
    return _render(quoted, [f'listen: "127.0.0.1:{port}"', f"ports_file_dir: {json.dumps(ports_folder)}"])


def _render(passwords: Mapping[Role, str], head: list[str]) -> str:
    lines = [
        *head,
        f"max_payload: {MAX_PAYLOAD}",
        "authorization {",
        f"  timeout: {AUTHORIZATION_TIMEOUT_S}",
        "  users = [",
    ]
    for role, permissions in subjects.PERMISSIONS.items():
        lines += [
            "    {",
            f"      user: {role}",
            f"      password: {passwords[role]}",
            "      permissions: {",
            f"        publish: {json.dumps(permissions.publish)}",
            f"        subscribe: {json.dumps(permissions.subscribe)}",
            "      }",
            "    }",
        ]
    return "\n".join([*lines, "  ]", "}", ""])


if __name__ == "__main__":
    sys.stdout.write(for_compose())
