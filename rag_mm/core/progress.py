"""Progress with remaining time on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rag_mm.core import terminal

QUIET_SECONDS = 30.0
_is_quiet = False


def be_quiet() -> None:
    """Limits this process to warnings from now on; the leader of a multi-process run shows the progress."""
    global _is_quiet
    _is_quiet = True


class Bar(Protocol):
    """What `track` yields."""

    def update(self, position: float, **values: float) -> None:
        """Reports that `position` of the total is reached, with the latest values to display."""


@contextlib.contextmanager
def track(name: str, total: int, start: int = 0) -> Iterator[Bar]:
    """Yields a bar that counts from `start` (the step a loop resumes at) to `total`, in the caller's unit."""
    if _is_quiet or not sys.stderr.isatty():
        yield _Lines(name, total, start)
        return
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[values]}"),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=start, values="")
        yield _Terminal(progress, task)


def say(message: str) -> None:
    """Prints one line on stderr, such as that a stage starts or was skipped."""
    if not _is_quiet:
        warn(message)


def warn(message: str) -> None:
    """Prints one line on stderr, in quiet processes too."""
    print(terminal.printable(message), file=sys.stderr, flush=True)


class _Terminal:
    def __init__(self, progress, task):
        self._progress = progress
        self._task = task

    def update(self, position: float, **values: float) -> None:
        self._progress.update(self._task, completed=position, values=_format(values))


class _Lines:
    def __init__(self, name: str, total: int, start: int):
        self._name = name
        self._total = total
        self._start = start
        self._start_time = self._last_printed = time.monotonic()

    def update(self, position: float, **values: float) -> None:
        now = time.monotonic()
        if now - self._last_printed < QUIET_SECONDS:
            return
        self._last_printed = now
        done = position - self._start
        if done > 0:
            left = _duration((now - self._start_time) / done * (self._total - position))
            say(f"{self._name} {position}/{self._total}, {left} left {_format(values)}".rstrip())


def _format(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
