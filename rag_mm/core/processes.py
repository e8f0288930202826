"""Several processes as one program: how they find one another, what the first tells, how all end."""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

# The table of texts that all processes of a program share has no public name; Orbax takes it from here too.
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_mm.core import progress
from rag_mm.core.errors import UserError

# A process that is not heard of for so long is gone, and all others end: within a minute, network and all.
HEARTBEAT_SECONDS = 30
# How long the first of them is waited for, and how long it waits for the others.
_MEETING_SECONDS = 300
_POLL_SECONDS = 1.0
# An error that comes to all is for process 0 to say, and to clean up after, even if another met it before.
_GRACE_SECONDS = 10.0
_END, _WORD = "rag_mm/end", "rag_mm/word"
_numbers = itertools.count()


class End(NamedTuple):
    """Which process ended all, with which exit code, and why."""

    process: int
    code: int
    reason: str


def join(
    address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several, before any device is used; all call it, and wait for each other.

    The first of them alone shows progress from then on.

    Args:
        address: host:port of process 0, where they meet; None where jax finds out by itself (TPU pods,
            Slurm, Kubernetes).
        num_processes, process_id: how many there are and which one this is, from 0; None as above.

    Raises:
        UserError: jax cannot find out, or nothing can be opened at the address. (Where some do not come
            within five minutes, jax itself ends the others.)
    """
    if num_processes != 1:
        who = "This process" if process_id is None else f"Process {process_id} of {num_processes}"
        progress.say(f"{who} meets the others at {address or 'a place that jax finds'}.")
    # `train.preemption` hears SIGTERM and lets all agree; jax's own service would take the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=_MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
        if jax.process_count() > 1:
            _shake_hands()
    except ValueError as error:
        raise UserError(
            "jax does not find the other processes by itself here; name host and port of the first of "
            "them, how many there are, and which one this is."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = f"{error}".strip().partition("\n")[0]
        raise UserError(
            f"The processes do not meet at {address or 'process 0'} ({reason})."
        ) from error
    if jax.process_index():
        progress.be_quiet()


def broadcast_from_leader(text: str = "") -> str:
    """What process 0 says, in every process; the others wait for it as long as it takes.

    All call it alike. It goes by the network between hosts, not by the devices: while process 0 works alone,
    no device of another has to wait in a collective.
    """
    if jax.process_count() == 1:
        return text
    key = f"{_WORD}/{next(_numbers)}"
    if jax.process_index() == 0:
        _table().key_value_set(key, text)
        return text
    while True:
        try:
            return _table().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


@contextlib.contextmanager
def watch_others() -> Iterator[Callable[[], End | None]]:
    """Ends this process when another calls `abort_all` while the body runs.

    Gives a function that says whose end was heard; None as long as nobody's was.
    """
    heard: list[End] = []
    me = jax.process_index()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_POLL_SECONDS):
            try:
                heard.append(End(*json.loads(_table().key_value_try_get(_END))))
            except jax.errors.JaxRuntimeError:  # Not there, which is well.
                continue
            if heard[0].process == me:
                return
            if me == 0 and heard[0].code < 128:  # No signal's.
                is_over.wait(_GRACE_SECONDS)
            if not is_over.is_set():
                end_with(heard[0])
            return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: heard[0] if heard else None
    finally:
        is_over.set()
        thread.join()


def end_with(end: End) -> NoReturn:
    """Ends this process as another has."""
    progress.warn(f"rag-mm: process {end.process} has ended: {end.reason}")
    _exit(end.code)


def abort_all(code: int, reason: str) -> NoReturn:
    """Ends this process at once, and with it all others, which `watch_others`.

    Nothing is cleaned up, as in a kill: leaving in good order would wait for those that are told here.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Somebody else's end was first.
        _table().key_value_set(_END, json.dumps(End(jax.process_index(), code, reason)))
    if jax.process_index() == 0:
        time.sleep(3 * _POLL_SECONDS)  # The table ends with this process.
    _exit(code)


def _shake_hands() -> None:
    """One collective between hosts, and one over all devices, while all processes are here together.

    On CPUs jax connects them at the first one, and gives up where another comes half a minute later; a
    program that takes so long to compile in one of them, and not in the other, is not rare.
    """
    _table().wait_at_barrier("rag_mm/joined", 1000 * _MEETING_SECONDS)
    multihost_utils.sync_global_devices("rag_mm joined")
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("all",)))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1, np.float32))
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=whole)(ones))


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _table() -> Any:
    return distributed.global_state.client
