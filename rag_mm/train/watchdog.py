"""A process that is stuck says where, and ends: without it the others would wait for ever."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the process with exit code 1 if the body takes longer, with all threads' stacks on stderr.

    The interpreter need not come by: a thread in C watches. One body at a time, and not nested.
    """
    # A notebook's or a test's stderr is no file; the one that the process began with is.
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
