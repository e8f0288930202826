"""Multi-process programs: connecting, broadcasting from the leader (process 0), coordinated shutdown."""

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

# The key-value store shared by all processes has no public API; Orbax imports it from here too.
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_mm.core import progress
from rag_mm.core.errors import UserError

# A process without a heartbeat for this long counts as lost, and all others exit, within a minute overall.
HEARTBEAT_SECONDS = 30
# How long processes wait for process 0 at startup, and process 0 for the others.
_JOIN_SECONDS = 300
_POLL_SECONDS = 1.0
# If all processes fail alike, process 0 gets this long to report the error and clean up itself.
_GRACE_SECONDS = 10.0
_FAILURE_KEY, _BROADCAST_KEY, _ARRIVED_KEY = "rag_mm/end", "rag_mm/word", "rag_mm/arrived"
_broadcast_ids, _arrival_ids = itertools.count(), itertools.count()


class Failure(NamedTuple):
    """Which process made all exit, with which exit code, and why."""

    process: int
    code: int
    reason: str


def join(
    address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process to the others; every process calls it, before any device is used, and waits.

    From then on only process 0 shows progress.

    Args:
        address: host:port of process 0; None to let jax detect all three values (TPU pods, Slurm,
            Kubernetes).
        num_processes, process_id: the number of processes and the index of this one, from 0; None as above.

    Raises:
        UserError: jax cannot detect the values, or the address cannot be opened. (If some processes do not
            connect within five minutes, jax itself ends the others.)
    """
    if num_processes != 1:
        who = "This process" if process_id is None else f"Process {process_id} of {num_processes}"
        progress.say(
            f"{who} connects to the others at {address or 'the address that jax detects'}."
        )
    # `train.preemption` handles SIGTERM for all processes; jax's preemption service would intercept it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
        if jax.process_count() > 1:
            _warm_up_collectives()
    except ValueError as error:
        raise UserError(
            "jax cannot detect the other processes here; give --coordinator=HOST:PORT, --num-processes and "
            "--process-id."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = f"{error}".strip().partition("\n")[0]
        raise UserError(
            f"The processes cannot connect at {address or 'process 0'} ({reason})."
        ) from error
    if jax.process_index():
        progress.be_quiet()


def broadcast_from_leader(text: str = "") -> str:
    """Returns process 0's `text` in every process; the others wait for it without a time limit.

    Every process calls it, in the same order. The text travels over the host network, not the devices, so
    no device waits in a collective while process 0 works alone.
    """
    if jax.process_count() == 1:
        return text
    key = f"{_BROADCAST_KEY}/{next(_broadcast_ids)}"
    if jax.process_index() == 0:
        _key_value_store().key_value_set(key, text)
        return text
    return _wait_for_key(key)


def wait_for_others() -> None:
    """In process 0: waits without a time limit until every process has called it; the others go on at once.

    Every process calls it, in the same order. As with `broadcast_from_leader`, no device waits.
    """
    key = f"{_ARRIVED_KEY}/{next(_arrival_ids)}"
    if jax.process_index():
        _key_value_store().key_value_set(f"{key}/{jax.process_index()}", "")
        return
    for other in range(1, jax.process_count()):
        _wait_for_key(f"{key}/{other}")


@contextlib.contextmanager
def watch_others() -> Iterator[Callable[[], Failure | None]]:
    """Exits this process when another one calls `abort_all` while the body runs.

    Yields:
        A function that returns the failure received from another process, or None so far.
    """
    failures: list[Failure] = []
    own_index = jax.process_index()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_POLL_SECONDS):
            try:
                text = _key_value_store().key_value_try_get(_FAILURE_KEY)
                failures.append(Failure(*json.loads(text)))
            except jax.errors.JaxRuntimeError:  # The key does not exist: no process has failed.
                continue
            if failures[0].process == own_index:
                return
            if own_index == 0 and failures[0].code < 128:  # Not a signal's exit code.
                is_over.wait(_GRACE_SECONDS)
            if not is_over.is_set():
                end_with(failures[0])
            return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: failures[0] if failures else None
    finally:
        is_over.set()
        thread.join()


def end_with(failure: Failure) -> NoReturn:
    """Exits with the exit code of the failed process, and reports its reason."""
    progress.warn(f"rag-mm: process {failure.process} has ended: {failure.reason}")
    _exit(failure.code)


def abort_all(code: int, reason: str) -> NoReturn:
    """Exits this process at once, and with it all others that are inside `watch_others`.

    Nothing is cleaned up, as after a kill: an orderly shutdown would wait for the processes notified here.
    """
    failure = Failure(jax.process_index(), code, reason)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another process failed first.
        _key_value_store().key_value_set(_FAILURE_KEY, json.dumps(failure))
    if jax.process_index() == 0:
        time.sleep(3 * _POLL_SECONDS)  # Others must read the store, which ends with this process.
    _exit(code)


def _warm_up_collectives() -> None:
    """Runs one collective between hosts and one over all devices, while all processes are in step.

    On CPUs jax connects the processes at the first collective and fails if one arrives half a minute later
    than another, which happens when a program compiles that long in only one of them.
    """
    _key_value_store().wait_at_barrier("rag_mm/joined", 1000 * _JOIN_SECONDS)
    multihost_utils.sync_global_devices("rag_mm joined")
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("all",)))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1, np.float32))
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated)(ones))


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_key(key: str) -> str:
    while True:
        try:
            return _key_value_store().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _key_value_store() -> Any:
    return distributed.global_state.client
