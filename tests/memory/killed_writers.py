"""Writers that kill themselves with SIGKILL; a program, so that no jax has started in what it forks.

    killed_writers.py FOLDER

runs each action up to each point, in FOLDER/"ACTION POINT".
"""

import json
import os
import pathlib
import signal
import sys

from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.store import manifest, shard_file
from rag_mm.memory.writing import staging, writer

OPTIONS = writer.Options(index="exact", batch_size=4, shard_size=6)
# Where a writer dies: before or after which function.
POINTS = {
    "shard written": (shard_file.ShardWriter, "close", "after"),
    "shard committed": (staging.Staging, "commit", "after"),
    "index saved": (ExactIndex, "save", "after"),
    "before the switch": (manifest, "switch", "before"),
    "after the switch": (manifest, "switch", "after"),
}
ACTIONS = {
    "build": lambda path, encoder: retrieval_memory.Memory.build(
        path, make_documents(15), encoder, options=OPTIONS
    ),
    "add": lambda path, encoder: retrieval_memory.Memory.open(path, encoder).add(
        make_documents(15, 15), options=OPTIONS
    ),
    "compact": lambda path, encoder: retrieval_memory.Memory.open(path).compact(prune=True),
}


def ids(stop: int, start: int = 0) -> list[str]:
    """The ids of `make_documents(stop - start, start)`."""
    return [f"doc-{i:03d}" for i in range(start, stop)]


REMOVED = ids(15)[::2]  # Before a compaction.


def prepare(action: str, path: pathlib.Path) -> None:
    """Makes the memory that the action begins with."""
    if action != "build":
        ACTIONS["build"](path, StandInEncoder())
    if action == "compact":
        retrieval_memory.Memory.open(path).remove(REMOVED)


def _die_at(point: str) -> None:
    owner, name, when = POINTS[point]
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def _fork(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def kill_at_points(folder: pathlib.Path) -> None:
    """Runs each action up to each point, each in a folder; prints the signals that ended them."""
    signals = {}
    for action in ACTIONS:
        for point in POINTS:
            path = folder / f"{action} {point}"

            def work(action=action, point=point, path=path):
                prepare(action, path)
                _die_at(point)
                ACTIONS[action](path, StandInEncoder())

            _, status = os.waitpid(_fork(work), 0)
            signals[path.name] = -os.waitstatus_to_exitcode(status)
    print(json.dumps(signals))


if __name__ == "__main__":
    kill_at_points(pathlib.Path(sys.argv[1]))
