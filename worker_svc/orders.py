"""What a process that waits to become a worker is told: a line of JSON on its standard input (`weft.child.orders`).

It has the environment that settings are read from, and the log file to write to.
"""

from __future__ import annotations

import json
import os
import sys


def wait_for_orders() -> bytes:
    """The next line of them. Ends the process without one before the end of the input."""
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit(0)
    return line


def obey(line: bytes) -> None:
    """Become the worker that is wanted. Raises OSError if its log cannot be written."""
    orders = json.loads(line)
    os.environ.update(orders["environ"])
    log = os.open(orders["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
