"""The standard streams of a command: any terminal, closed ones, and readers that have read enough."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import rich.console


def prepare() -> None:
    """Makes stdout and stderr writable where they are closed, or cannot encode all characters."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # Else the next file that is opened would get what is printed.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flushes stdout; on an error nothing more is printed, as Python would report it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()
        raise


def discard_stdout() -> None:
    """Sends what is still printed to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def make_console() -> "rich.console.Console":
    """A console on stdout that does not wrap lines at 80 columns without a terminal.

    It raises BrokenPipeError if the reader has exited, where rich would end the process with code 1.
    """
    import rich.console  # Imported here, so that help needs no library.

    class Console(rich.console.Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


@contextlib.contextmanager
def stdout_for_result(is_json: bool) -> Iterator[None]:
    """With `is_json`, what libraries print in the body, from C too, goes to stderr."""
    if not is_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
