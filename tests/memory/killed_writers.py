"""Writers that kill themselves with SIGKILL; a program, so that no jax is loaded in the processes it forks.

killed_writers.py points FOLDER         each action, killed at each point, in FOLDER/"ACTION POINT"
killed_writers.py run PATH LOG SEED     changes a memory until it is killed from outside
"""

import itertools
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import numpy as np
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


def operations(seed: int) -> Iterator[tuple[str, list, list[str]]]:
    """An endless sequence of changes to a memory of 15 documents: (name, arguments, ids after it)."""
    rng = np.random.default_rng(seed)
    live, count = ids(15), 15
    while True:
        name = ("add", "remove", "compact")[rng.integers(3)]
        arguments: list = []
        if name == "add":
            arguments = [count, int(rng.integers(5, 30))]
            live = live + ids(sum(arguments), count)
            count = sum(arguments)
        elif name == "remove" and len(live) > 8:
            arguments = rng.choice(live, 6, replace=False).tolist()
            live = [document for document in live if document not in arguments]
        elif name == "remove":
            continue
        yield name, arguments, list(live)


def possible_ids(seed: int, operation: int) -> list[list[str]]:
    """The ids before and after `operation` of `operations(seed)`."""
    states = [ids(15)]
    states += [live for _, _, live in itertools.islice(operations(seed), operation + 1)]
    return states[operation:]


def _apply(opened: retrieval_memory.Memory, name: str, arguments: list) -> retrieval_memory.Memory:
    if name == "add":
        return opened.add(make_documents(arguments[1], arguments[0]), options=OPTIONS)
    return opened.remove(arguments) if name == "remove" else opened.compact()


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


def run_until_killed(path: pathlib.Path, log: pathlib.Path, seed: int) -> None:
    """Builds a memory and changes it without end; writes each operation's number to `log` before it."""
    ACTIONS["build"](path, StandInEncoder())
    opened = retrieval_memory.Memory.open(path, StandInEncoder())
    with log.open("w") as file:
        for number, (name, arguments, _) in enumerate(operations(seed)):
            file.write(f"{number}\n")
            file.flush()
            opened = _apply(opened, name, arguments)


if __name__ == "__main__":
    if sys.argv[1] == "points":
        kill_at_points(pathlib.Path(sys.argv[2]))
    else:
        run_until_killed(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]))
