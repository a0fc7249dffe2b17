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

if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        # The parent may have died before it was asked for.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(program, sys.argv[2:])
