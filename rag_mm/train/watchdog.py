"""Ends a stuck process with its stack traces, because the other processes would wait forever for it."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the process with exit code 1 and all threads' stacks on stderr if the body takes longer.

    A C thread watches, so this works even while the interpreter is blocked. Not reentrant.
    """
    # sys.stderr may not be a real file in notebooks and tests; the original one is.
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
