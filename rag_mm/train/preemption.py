"""SIGTERM heard and answered: what is finished is committed, and the process ends with exit code 143.

Python's own handlers wait for the interpreter, which a compile in C++ does not return to for minutes. So a
thread reads the signal from a pipe; where nothing is newer than the last commit it ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

EXIT_CODE = 128 + signal.SIGTERM


class Stop:
    """Whether an end was asked for; the loop says in `is_clean` whether all it has is on disk."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_clean = True

    def ask(self) -> None:
        """What the signal does."""
        self.is_asked = True
        if self.is_clean:
            # The main thread may sit in a compile, and has nothing that could be lost.
            os._exit(EXIT_CODE)


@contextlib.contextmanager
def listen() -> Iterator[Stop]:
    """Hears SIGTERM while the body runs; outside of the main thread, where none arrives, it never does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler of Python's must stand for the number to reach the pipe.
    old_handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    old_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers:
                stop.ask()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_pipe)
        signal.signal(signal.SIGTERM, old_handler)
        os.close(writer)
        thread.join()
        os.close(reader)
