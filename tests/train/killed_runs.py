"""Runs that are ended with SIGKILL; a script, so that processes are forked before jax starts threads."""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import test_loop

from rag_mm.data import pipeline
from rag_mm.train import checkpoint, loop, preemption, train_metrics

# Long enough that a random time can fall into any part of it.
LONG = loop.LoopConfig(num_steps=120, log_every=3, checkpoint_every=6)
# Points at which a run of `test_loop.SCHEDULE` (8 steps, log every 2, checkpoint every 4) is killed: the
# function, which call of it, before or after the call, and the checkpoints that are complete by then.
POINTS = {
    "batch loaded": (loop._Run, "next_batch", 3, "after", []),
    "step taken, between two logs": (preemption.Stop, "reach", 7, "after", [4]),
    # Two logs are written each time: speed and losses.
    "log written, its checkpoint not": (train_metrics.Log, "write", 8, "after", [4]),
    "checkpoint half written": (checkpoint._IteratorState, "save", 1, "after", []),
    "checkpoint committed": (preemption.Stop, "commit", 1, "before", [4]),
}


def die_at(point: str, folder: pathlib.Path) -> None:
    owner, name, at, when, saved = POINTS[point]
    original, count = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal count
        count += 1
        result = original(*args, **kwargs) if when == "after" or count != at else None
        if count == at:
            deadline = time.monotonic() + 60
            # Checkpoints started before are still being written in the background.
            while steps_saved(folder) != saved and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


class RecordingIterator:
    """An iterator that records which records were in each batch."""

    def __init__(self, iterator):
        self._iterator = iterator
        self.order: dict[int, list[int]] = {}

    def __next__(self):
        batch = next(self._iterator)
        self.order[self._iterator.get_state()["next_index"]] = batch[pipeline.RECORDS].tolist()
        return batch

    def __getattr__(self, name):
        return getattr(self._iterator, name)


def run(folder: pathlib.Path, config: loop.LoopConfig, step_fn=None) -> dict:
    """Runs from the newest checkpoint to the end: digest of the state, the log, and the order of the data."""
    parts = test_loop.begin()
    recording = parts["iterator"] = RecordingIterator(parts["iterator"])
    parts["step_fn"] = step_fn or parts["step_fn"]
    state, _ = loop.fit("line", directory=folder, config=config, **parts)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return {
        "state": hashlib.sha256(b"".join(leaves)).hexdigest(),
        "log": (folder / "log.jsonl").read_text(),
        "order": {str(step): records for step, records in recording.order.items()},
    }


def _in_child(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def kill_at_points(folder: pathlib.Path) -> None:
    """Kills a run at each point in its own folder, then resumes it there; prints all endings and results."""
    endings = {}
    for point in POINTS:

        def work(point=point):
            die_at(point, folder / point)
            run(folder / point, test_loop.SCHEDULE)

        _, status = os.waitpid(_in_child(work), 0)
        endings[point] = -os.waitstatus_to_exitcode(status)
    step_fn = test_loop.begin()["step_fn"]
    saved = {point: steps_saved(folder / point) for point in POINTS}
    results = {
        point: run(folder / point, test_loop.SCHEDULE, step_fn) for point in ("unbroken", *POINTS)
    }
    print(json.dumps({"endings": endings, "saved": saved, "results": results}))


def steps_saved(folder: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    if sys.argv[1] == "points":
        kill_at_points(pathlib.Path(sys.argv[2]))
    else:
        print(json.dumps(run(pathlib.Path(sys.argv[2]), LONG)))
