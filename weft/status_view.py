"""What `weft up` shows while it starts and runs: live lines on a terminal, one line a change elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

from weft.child import Child, News

FRAMES: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAMES_PER_S: Final = 10
BAR_CHARS: Final = 20
# More processes of a role than this share a line.
MAX_LINES_OF_A_ROLE: Final = 8


class View(Protocol):
    """Shown from `__enter__` until `started`; news go on after that."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the live part."""

    def tell(self, news: News) -> None:
        """Take in news of a child."""

    def say(self, text: str) -> None:
        """Show a line, or several, that stay."""


def make_view(out: TextIO, children: Callable[[], Sequence[Child]]) -> View:
    """The view that suits the stream."""
    return LiveView(out, children) if out.isatty() else PlainView(out)


class PlainView:
    """For pipes and log files: every change is a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is live here."""

    def tell(self, news: News) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {news.text}")

    def say(self, text: str) -> None:
        # The mesh goes on when whoever read this is gone.
        with contextlib.suppress(OSError):
            self._out.write(text + "\n")
            self._out.flush()


class LiveView:
    """For terminals: a line a process while they start, redrawn in place."""

    def __init__(self, out: TextIO, children: Callable[[], Sequence[Child]]) -> None:
        # Only a terminal needs it, and it costs a tenth of a second.
        from rich.console import Console
        from rich.live import Live

        self._children = children
        self._console = Console(file=out, highlight=False, markup=False, soft_wrap=True)
        self._live = Live(
            console=self._console, get_renderable=self._draw, refresh_per_second=FRAMES_PER_S, transient=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def tell(self, news: News) -> None:
        # While the lines are live they say who is ready.
        if news.kind == "trouble" or not self._live.is_started:
            self.say(f"{time.strftime('%H:%M:%S')} {news.text}")

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text)

    def _draw(self) -> str:
        return "\n".join(status_lines(self._children(), time.monotonic()))


def status_lines(children: Sequence[Child], now: float) -> list[str]:
    """A line a child, or one for all children of a role if there are many of them. Pure."""
    lines: list[str] = []
    for role in dict.fromkeys(child.spec.role for child in children):
        those = [child for child in children if child.spec.role == role]
        if len(those) <= MAX_LINES_OF_A_ROLE:
            lines += [_line(child, now) for child in those]
            continue
        ready = sum(child.state == "ready" for child in those)
        mark = "✓" if ready == len(those) else _spinner(now)
        lines.append(f"  {mark} {f'{role}s':14} {ready} of {len(those)} ready")
    return lines


def _line(child: Child, now: float) -> str:
    name = f"{child.spec.name:14}"
    match child.state:
        case "ready":
            return f"  ✓ {name} ready     {child.ready_at - child.since:5.1f} s"
        case "waiting":
            return f"  ✗ {name} died, to be started again"
        case "ended":
            return f"  · {name} ended"
        case _:
            doing = "starting" if child.epoch is None or child.spec.role != "worker" else "loading"
            # Nothing has begun before the NATS server is up.
            taken = now - child.since if child.since else 0.0
            return f"  {_spinner(now)} {name} {doing:9} {taken:5.1f} s{_bar(child.loaded)}"


def _bar(share: float) -> str:
    if not share:
        return ""
    full = int(share * BAR_CHARS)
    return f"  {'█' * full}{'░' * (BAR_CHARS - full)} {share:4.0%}"


def _spinner(now: float) -> str:
    return FRAMES[int(now * FRAMES_PER_S) % len(FRAMES)]
