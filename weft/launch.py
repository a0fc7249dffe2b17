"""Become another program, one that dies with its parent: `python -I -S launch.py PARENT_PID PROGRAM ARGUMENTS...`

The supervisor starts every child through this file, so that a `kill -9` of the supervisor leaves nothing behind:
Linux sends SIGKILL to a process whose parent has died if it asked for it (prctl(2), PR_SET_PDEATHSIG), and the wish
outlives execve. Elsewhere the child simply runs; an orphan then ends when somebody ends it. Costs 25 ms a process.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def die_with(parent: int) -> None:
    """Let this process be killed when its parent dies, or end it now if it has another parent than this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        # The parent may have died before it was asked for.
        if os.getppid() != parent:
            os._exit(1)


def adopt_orphans() -> None:
    """From now on, a descendant of this process whose parent dies becomes its child. On Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
