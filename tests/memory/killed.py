"""Writers that are ended with SIGKILL; run as a script, so that what is forked has no jax in it yet."""

import json
import os
import pathlib
import signal
import sys

import numpy as np
from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.store import manifest, shard_file
from rag_mm.memory.writing import staging, writer

OPTIONS = writer.Options(index="exact", batch_size=4, shard_size=6)
GONE = [f"doc-{i:03d}" for i in range(0, 15, 2)]
# Where a writer dies: the function, and whether before or after it.
POINTS = {
    "shard written": (shard_file.ShardWriter, "close", "after"),
    "shard committed": (staging.Staging, "commit", "after"),
    "index saved": (ExactIndex, "save", "after"),
    "before the switch": (manifest, "switch", "before"),
    "after the switch": (manifest, "switch", "after"),
}
ACTIONS = {
    "build": lambda path: retrieval_memory.Memory.build(
        path, make_documents(15), StandInEncoder(), options=OPTIONS
    ),
    "add": lambda path: retrieval_memory.Memory.open(path, StandInEncoder()).add(
        make_documents(15, 15), options=OPTIONS
    ),
    "compact": lambda path: retrieval_memory.Memory.open(path).compact(prune=True),
}


def before(action: str, path: pathlib.Path) -> None:
    """What stands there when the action begins."""
    if action != "build":
        ACTIONS["build"](path)
    if action == "compact":
        retrieval_memory.Memory.open(path).remove(GONE)


def operations(seed: int):
    """What is done one after the other to 15 documents, and the ids that are there then, without end."""
    rng = np.random.default_rng(seed)
    live, count = [f"doc-{i:03d}" for i in range(15)], 15
    while True:
        kind = ("add", "remove", "compact")[rng.integers(3)]
        what: list = []
        if kind == "add":
            what = [count, int(rng.integers(5, 30))]
            live = live + [f"doc-{i:03d}" for i in range(count, sum(what))]
            count = sum(what)
        elif kind == "remove" and len(live) > 8:
            what = rng.choice(live, 6, replace=False).tolist()
            live = [name for name in live if name not in what]
        elif kind == "remove":
            continue
        yield kind, what, list(live)


def do(opened: retrieval_memory.Memory, kind: str, what: list) -> retrieval_memory.Memory:
    if kind == "add":
        return opened.add(make_documents(what[1], what[0]), options=OPTIONS)
    return opened.remove(what) if kind == "remove" else opened.compact()


def _die_at(point: str) -> None:
    owner, name, when = POINTS[point]
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def _in_child(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def kill_at_points(folder: pathlib.Path) -> None:
    """Each action at each point, in folders of its own; prints how each child ended."""
    endings = {}
    for action in ACTIONS:
        for point in POINTS:
            path = folder / f"{action} {point}"

            def work(action=action, point=point, path=path):
                before(action, path)
                _die_at(point)
                ACTIONS[action](path)

            _, status = os.waitpid(_in_child(work), 0)
            endings[path.name] = -os.waitstatus_to_exitcode(status)
    print(json.dumps(endings))


def run_until_killed(path: pathlib.Path, log: pathlib.Path, seed: int) -> None:
    """Builds and changes a memory without end, and says in `log` what is done."""
    ACTIONS["build"](path)
    opened = retrieval_memory.Memory.open(path, StandInEncoder())
    with log.open("w") as file:
        for number, (kind, what, _) in enumerate(operations(seed)):
            file.write(f"{number}\n")
            file.flush()
            opened = do(opened, kind, what)


if __name__ == "__main__":
    if sys.argv[1] == "points":
        kill_at_points(pathlib.Path(sys.argv[2]))
    else:
        run_until_killed(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]))
