"""A chain of stages under several processes: process 0 leads, the others do what it says.

Process 0 runs the chain as it would alone: it holds the lock, and writes manifests, metrics and times. Where
a stage is shared it says so first, and the others go into the stage's function with it; where it is not,
they wait for the next word. What ends one of them ends all (`core.processes.abort_all`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from rag_mm.core import files, processes, run_folder
from rag_mm.core.errors import UserError

# How long a folder on a network may take to show what another machine wrote.
_PATIENCE_SECONDS = 30.0
_OVER = ""


def is_leader() -> bool:
    """Whether this process is the first, or the only one: the one that writes."""
    return jax.process_index() == 0


def has_others() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def agree(asked: Mapping[str, Any]) -> None:
    """Refuses processes that were not all asked for the same.

    Raises:
        UserError: this one was asked for something else than process 0.
    """
    own = files.digest(files.canonical_json(asked).encode())
    if processes.broadcast_from_leader(own) != own:
        raise UserError(
            f"Process {jax.process_index()} was started with another config or other options than "
            "process 0; start all with the same command."
        )


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """For process 0: the chain, at whose good end the others are dismissed."""
    yield
    processes.broadcast_from_leader(_OVER)


def share(stage: str) -> None:
    """For process 0: the others enter this stage now."""
    processes.broadcast_from_leader(stage)


def follow(run: run_folder.Run, stages: Mapping[str, Callable[[], Any]]) -> None:
    """For the others: does the stages that process 0 shares, until it is done with all.

    Raises:
        UserError: this process does not see the folder of process 0.
    """
    while stage := processes.broadcast_from_leader():
        _await_stage(run, stage)
        stages[stage]()


def _await_stage(run: run_folder.Run, stage: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (manifest := run.manifest(stage)) is None or manifest.is_done:
        if time.monotonic() > deadline:
            raise UserError(
                f"Process {jax.process_index()} does not see {run.stage_dir(stage)} of process 0; "
                "--workdir is to be a folder that all machines share."
            )
        time.sleep(0.2)
