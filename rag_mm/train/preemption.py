"""SIGTERM handling: finished steps are saved, then the process exits with code 143.

Python's signal handlers run only in the interpreter, to which a compilation in C++ may not return for
minutes. So a thread reads the signal from a pipe, and exits at once if no step is newer than the last
checkpoint.

Several processes stop after the same step and all write the checkpoint, even if only one received SIGTERM.
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
    """A stop request; the loop reports each step with `reach`, checkpoints report theirs with `commit`."""

    def __init__(self) -> None:
        self.is_requested = False
        self._reached = self._committed = 0

    def request(self) -> None:
        """Requests a stop; exits at once if nothing would be lost."""
        self.is_requested = True
        self._end_if_clean()

    def reach(self, step: int) -> None:
        """Reports that `step` is done but not yet saved."""
        self._reached = step

    def commit(self, step: int) -> None:
        """Reports that `step` is saved on disk; called by the writer thread."""
        self._committed = step
        if self.is_requested:
            self._end_if_clean()

    def _end_if_clean(self) -> None:
        # os._exit, because the main thread may be compiling. With several processes the others would hang.
        if self._committed >= self._reached and jax.process_count() == 1:
            os._exit(EXIT_CODE)


class Agreement:
    """Whether to stop after a step (`is_due`), with the same result in every process."""

    def __init__(self, stop: Stop, mesh: Mesh):
        self._stop = stop
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._any_requested: jax.Array | None = None

    def is_due(self) -> bool:
        """Call it after each step. With several processes the result is one step old, so none has to wait."""
        if jax.process_count() == 1:
            return self._stop.is_requested
        previous, flag = self._any_requested, np.asarray([self._stop.is_requested], np.int32)
        shape = (self._sharding.num_devices,)
        self._any_requested = self._any(
            jax.make_array_from_callback(shape, self._sharding, lambda _: flag)
        )
        return previous is not None and bool(previous)

    def is_requested(self) -> bool:
        """Whether any process has a stop request now. Waits for all, so call it only after the last step."""
        self.is_due()
        if self._any_requested is None:
            return self._stop.is_requested
        return bool(self._any_requested)


@contextlib.contextmanager
def listen(on_sigterm: Callable[[], None]) -> Iterator[None]:
    """Calls `on_sigterm` from a watcher thread on SIGTERM in the body; when nested, only the innermost.

    Outside the main thread, which cannot set signal handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The signal number reaches the pipe only if a Python handler is installed.
    old_handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    old_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers:
                on_sigterm()

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
