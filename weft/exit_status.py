"""How every process of ours ends when it cannot go on: one sentence on standard error, and a status that says why."""

from __future__ import annotations

import sys
from typing import Final

from weft.errors import SettingsError, WeftError

FAILED: Final = 1
BAD_SETTINGS: Final = 2
INTERRUPTED: Final = 130  # as shells say it of Ctrl-C


def complain(prog: str, error: WeftError) -> int:
    """Write the error as `prog`'s last sentence; returns the exit status that belongs to it."""
    sys.stderr.write(f"{prog}: {error.message}\n")
    return BAD_SETTINGS if isinstance(error, SettingsError) else FAILED
