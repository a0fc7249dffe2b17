"""Looking at processes, as a test's witness."""

from __future__ import annotations

import contextlib
from pathlib import Path


def is_alive(pid: int) -> bool:
    """False for zombies too."""
    return _stat(pid) is not None


def children_of(pid: int) -> dict[int, str]:
    """Command lines of the living direct children, by process id, but for what `multiprocessing` keeps for itself."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    found = {child: command(child) for child in pids if _stat(child) == pid}
    return {child: line for child, line in found.items() if "multiprocessing.resource_tracker" not in line}


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def _stat(pid: int) -> int | None:
    """The parent of a living process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[1])
