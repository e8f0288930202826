"""Keeps what native libraries log for their authors off stderr."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

# Lines of Abseil's log of level INFO, and its remark that nobody has set its log up.
_NOISE = re.compile(
    rb"^(I\d{4} \d\d:\d\d:[^\n]*\]|WARNING: All log messages before absl::InitializeLog)[^\n]*\n?",
    re.MULTILINE,
)
_lock = threading.Lock()


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Drops Abseil's INFO lines that native code writes to stderr in the body; all else follows after it.

    For libraries that offer no setting of their own. The whole process' stderr is held back meanwhile, so the
    body should be short and do nothing but call the library. One thread at a time.
    """
    with _lock:
        try:
            terminal = os.dup(2)
        except OSError:  # stderr is closed.
            yield
            return
        sys.stderr.flush()
        held = os.memfd_create("stderr")
        os.dup2(held, 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            with open(held, "rb") as file:
                file.seek(0)
                rest = _NOISE.sub(b"", file.read())
            with contextlib.suppress(OSError), open(2, "wb", closefd=False) as stderr:
                stderr.write(rest)
