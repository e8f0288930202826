"""SIGTERM heard and answered: what is finished is committed, and the process ends with exit code 143.

Python's own handlers wait for the interpreter, which a compile in C++ does not return to for minutes. So a
thread reads the signal from a pipe; where nothing is newer than the last commit it ends the process at once.

Several processes end after the same step, even if one of them alone is told to: all write a checkpoint.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_CODE = 128 + signal.SIGTERM


class Stop:
    """Whether an end was asked for; the loop says what it has `reach`ed, checkpoints what they `commit`."""

    def __init__(self) -> None:
        self.is_asked = False
        self._reached = self._committed = 0

    def ask(self) -> None:
        """What the signal does."""
        self.is_asked = True
        self._end_if_clean()

    def reach(self, step: int) -> None:
        """From now on there is something to lose."""
        self._reached = step

    def commit(self, step: int) -> None:
        """All that was reached up to `step` is on disk; called by the thread that wrote it."""
        self._committed = step
        if self.is_asked:
            self._end_if_clean()

    def _end_if_clean(self) -> None:
        # The main thread may sit in a compile. One of several processes would leave the others waiting.
        if self._committed >= self._reached and jax.process_count() == 1:
            os._exit(EXIT_CODE)


class Agreement:
    """`is_due` after each step: whether to end after it, the same answer in every process."""

    def __init__(self, stop: Stop, mesh: Mesh):
        self._stop = stop
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def is_due(self) -> bool:
        """In several processes what any had heard one step ago, so that nobody waits for the answer."""
        if jax.process_count() == 1:
            return self._stop.is_asked
        before, flag = self._asked, np.asarray([self._stop.is_asked], np.int32)
        shape = (self._sharding.num_devices,)
        self._asked = self._any(jax.make_array_from_callback(shape, self._sharding, lambda _: flag))
        return before is not None and bool(before)

    def is_asked(self) -> bool:
        """After the last step, when there is time to wait for the answer: what any has heard until now."""
        self.is_due()
        return self._stop.is_asked if self._asked is None else bool(self._asked)


@contextlib.contextmanager
def listen(answer: Callable[[], None]) -> Iterator[None]:
    """Answers SIGTERM, from another thread, while the body runs; an inner one of two answers alone.

    Outside of the main thread, where no signal arrives, it never does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler of Python's must stand for the number to reach the pipe.
    old_handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    old_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers:
                answer()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_pipe)
        signal.signal(signal.SIGTERM, old_handler)
        os.close(writer)
        thread.join()
        os.close(reader)
