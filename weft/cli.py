"""The `weft` command. What a command needs is imported when it runs, so that `weft --help` is quick."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from weft.exit_status import BAD_SETTINGS, INTERRUPTED

# Command → what it does, and the `module:function` that does it: arguments in, exit status out.
COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "up": ("start the whole mesh on this machine", "weft.up:main"),
    "chat": ("talk to a running mesh in the terminal", "weft.chat:main"),
    "top": ("show every instance and its load", "weft.operate:top"),
    "policy": ("say or switch the policies that schedule requests", "weft.operate:policy"),
    "explain": ("show what became of a request, and why", "weft.explain:main"),
    "sim": ("play recorded traffic through simulated workers", "lab.simulator.__main__:sim"),
    "size": ("say how many workers recorded traffic needs", "lab.simulator.__main__:size"),
    "calibrate": ("measure this machine's engine for the simulator", "lab.calibrate:main"),
    "drain": ("let one instance finish its work and end; `weft up` starts it again", "weft.operate:drain"),
}


def main() -> None:
    """Console script: exits with the command's status, 2 if there is no such command."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"weft {importlib.metadata.version('weft')}\n")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `weft {close[0]}`?" if close else "see `weft --help`"
        sys.stderr.write(f"weft: no command {name!r}; {hint}\n")
        return BAD_SETTINGS
    try:
        status = _command(name)(argv[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  weft {name:{width}}  {help}" for name, (help, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: weft COMMAND [OPTIONS]",
            "",
            "LLM inference as a mesh of small services.",
            "",
            *lines,
            "",
            "`weft COMMAND --help` lists a command's options.",
            "",
        ]
    )


def _command(name: str) -> Callable[[Sequence[str]], int]:
    module, _, function = COMMANDS[name][1].partition(":")
    command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return command
