"""Progress on stderr with the time left: a bar on a terminal, elsewhere a line now and then."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

QUIET_SECONDS = 30.0
_is_quiet = False


def be_quiet() -> None:
    """From now on this process shows nothing but warnings: another of the same program does."""
    global _is_quiet
    _is_quiet = True


class Bar(Protocol):
    """What `track` hands out."""

    def update(self, position: float, **values: float) -> None:
        """Says that `position` of the total is reached, and the latest values worth seeing."""


@contextlib.contextmanager
def track(name: str, total: int, start: int = 0) -> Iterator[Bar]:
    """A bar from `start`, where a resumed loop goes on, to `total`, in the caller's unit."""
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
    """One line on stderr: what begins, what was skipped."""
    if not _is_quiet:
        warn(message)


def warn(message: str) -> None:
    """One line on stderr that no process keeps to itself."""
    print(message, file=sys.stderr, flush=True)


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
        self._began = self._spoke = time.monotonic()

    def update(self, position: float, **values: float) -> None:
        now = time.monotonic()
        if now - self._spoke < QUIET_SECONDS:
            return
        self._spoke = now
        done = position - self._start
        if done > 0:
            left = _duration((now - self._began) / done * (self._total - position))
            say(f"{self._name} {position}/{self._total}, {left} left {_format(values)}".rstrip())


def _format(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
