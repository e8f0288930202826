"""Runs a chain of stages in several processes: process 0 leads, the others follow.

Process 0 runs the chain as a single process would: it holds the lock and writes manifests, metrics and times.
Before a shared stage it broadcasts the stage's name, and all processes call the stage's function; during
other stages the followers wait. If one process fails, all end (`core.processes.abort_all`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from rag_mm.core import files, processes, run_folder
from rag_mm.core.errors import UserError

# How long a network file system may take to show what another machine wrote.
_VISIBILITY_TIMEOUT_SECONDS = 30.0
_END_OF_CHAIN = ""


def is_leader() -> bool:
    """Whether this is process 0, which writes the files; true for a single process."""
    return jax.process_index() == 0


def has_others() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def agree(arguments: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same arguments.

    Args:
        arguments: JSON values.

    Raises:
        UserError: this process has other arguments than process 0.
    """
    digest = files.digest(files.canonical_json(arguments).encode())
    if processes.broadcast_from_leader(digest) != digest:
        raise UserError(
            f"Process {jax.process_index()} was started with another config or other options than "
            "process 0; start all with the same command."
        )


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Context of the chain in process 0; tells the followers to return when it ends without an error."""
    yield
    processes.broadcast_from_leader(_END_OF_CHAIN)


def share(stage: str) -> None:
    """For process 0: starts a shared stage in the followers."""
    processes.broadcast_from_leader(stage)


def follow(run: run_folder.Run, stages: Mapping[str, Callable[[], Any]]) -> None:
    """For the followers: runs the stages that process 0 shares, until the chain ends.

    Raises:
        UserError: this process does not see the stage's folder of process 0.
    """
    while stage := processes.broadcast_from_leader():
        _await_stage(run, stage)
        stages[stage]()


def _await_stage(run: run_folder.Run, stage: str) -> None:
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
    while (manifest := run.manifest(stage)) is None or manifest.is_done:
        if time.monotonic() > deadline:
            raise UserError(
                f"Process {jax.process_index()} does not see {run.stage_dir(stage)} of process 0; "
                "--workdir must be a folder that all machines share."
            )
        time.sleep(0.2)
