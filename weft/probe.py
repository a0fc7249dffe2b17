"""The health check of a container: `python -S -m weft.probe PORT`, exit status 0 if this service's /ready says yes.

Runs every few seconds in every container, so it imports next to nothing (15 ms; urllib alone is 60).
"""

from __future__ import annotations

import socket
import sys
from typing import Final

TIMEOUT_S: Final = 3.0


def is_ready(port: int) -> bool:
    """Whether /ready on this machine's `port` answers 200 in time."""
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                return answer.readline(100).split()[1:2] == [b"200"]
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not is_ready(int(sys.argv[1])))
