"""Changes of a memory, each killed (SIGKILL) at a random instant, and what the memory is afterwards.

    python tests/memory/killed_changes.py FOLDER --kills=1000 [--processes=4] [--seed=0]

prints, as JSON, how far the changes of each kind had come; it ends with exit code 1 at the first memory that
does not open, does not verify clean, is neither what it was nor what it was to become, or takes no next
write. FOLDER must not exist; what failed stays in it.

With --processes=P, P memories are changed at a time. Each killed process is forked from one that has imported
all that changes import and has started neither jax nor a thread; it starts jax and says so before its change
begins. One further process, forked first and never killed, checks each memory and does the next write.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from memory_changes import MERGED, OPERATIONS, Operation, State, after, choose, ids, perform, read

from rag_mm.core.errors import UserError

OUTCOMES = ("nothing written", "begun", "published", "returned")
# A memory is built and lives through these, in random order; then another one is built.
LIFE = [*OPERATIONS[1:], "add", "add", "remove", "remove", "merge"]
FORK = multiprocessing.get_context("fork")


def _serve(channel: connection.Connection, _: None = None) -> None:
    """Calls the functions that are sent, with their arguments; sends back results or errors as text."""
    while True:
        function, *arguments = channel.recv()
        try:
            channel.send((True, function(*arguments)))
        except (AssertionError, UserError) as error:
            channel.send((False, f"{type(error).__name__}: {error}"))


def _change(channel: connection.Connection, path: pathlib.Path, operation: Operation) -> None:
    """Starts jax, says so, performs the operation, says how many seconds it took, and waits to be killed."""
    jax.device_put(np.zeros(1, np.float32)).block_until_ready()
    channel.send("started")
    began = time.monotonic()
    perform(path, operation)
    channel.send(time.monotonic() - began)
    signal.pause()


def start(target: Callable[..., None], *arguments: Any) -> tuple[Any, connection.Connection]:
    """Forks a process that has one end of a channel; returns it and the other end."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


class WrongMemory(Exception):
    """A memory that is not what it must be; the message says how."""


@dataclasses.dataclass
class Experiment:
    """Kills changes one after another and counts how far they had come.

    Attributes:
        folder: of all memories.
        rng: chooses changes and instants.
    """

    folder: pathlib.Path
    rng: np.random.Generator

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        self.counts = {name: collections.Counter() for name in OPERATIONS}
        self.resumed = 0
        self._fresh = iter(range(0, 800, 20))
        self._seconds: dict[str, float] = {}
        self._helper, self._channel = start(_serve)
        self._warm_up()

    def _ask(self, function: Callable, *arguments: Any) -> Any:
        self._channel.send((function, *arguments))
        is_well, answer = self._channel.recv()
        if not is_well:
            raise WrongMemory(f"{function.__name__} {arguments}: {answer}")
        return answer

    def _warm_up(self) -> None:
        """Imports here what changes import, and measures how long each takes in a forked process."""
        for name, numbers in MERGED.items():
            self._ask(perform, self.folder / name, Operation("build", ids(numbers)))
        path, state = self.folder / "warm", State()
        for name in OPERATIONS:
            operation = choose(self.rng, state, name, iter([0 if name == "build" else 20]))
            process, channel = start(_change, path, operation)
            assert channel.recv() == "started"
            self._seconds[name] = channel.recv()
            process.kill()
            process.join()
            state = after(state, operation)
            assert self._ask(read, path) == state
        for module in self._ask(_loaded_modules):
            if module not in sys.modules:
                importlib.import_module(module)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: a process forked from this one could hang"

    def run(self, num_kills: int) -> None:
        """Kills this many changes.

        Raises:
            WrongMemory: a memory is not what it must be.
        """
        done = life = 0
        while done < num_kills:
            life += 1
            path, state = self.folder / f"life {life}", State()
            self._fresh = iter(range(0, 800, 20))
            names = ["build", *self.rng.permutation(LIFE)][: num_kills - done]
            for name in names:
                operation = choose(self.rng, state, name, self._fresh)
                outcome, state = self._kill(path, state, operation)
                self.counts[name][outcome] += 1
                state = self._write_next(path, state, operation, outcome)
            done += len(names)
            print(f"{self.folder.name}: {done} kills", file=sys.stderr, flush=True)

    def _kill(self, path: pathlib.Path, state: State, operation: Operation) -> tuple[str, State]:
        """How far a killed operation had come, and the state of the memory then."""
        before = _names(path)
        typical = self._seconds[operation.name]
        process, channel = start(_change, path, operation)
        assert channel.recv() == "started"
        limit = self.rng.uniform(0, 1.4 * typical)
        time.sleep(limit)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        seconds = _received(channel)
        found = self._ask(read, path)
        if found not in (state, after(state, operation)):
            raise WrongMemory(
                f"{path} after {operation}:\n{found}\nis neither what it was nor\n{state}"
            )
        self._seconds[operation.name] = _next_estimate(typical, limit, seconds)
        if found != state:
            return ("published" if seconds is None else "returned"), found
        if seconds is not None:
            raise WrongMemory(f"{path}: {operation} returned, but is not there")
        return ("nothing written" if _names(path) == before else "begun"), found

    def _write_next(
        self, path: pathlib.Path, state: State, operation: Operation, outcome: str
    ) -> State:
        """Completes the killed operation or does another one; returns the state then."""
        is_there = outcome in OUTCOMES[2:]
        if not is_there and (state.version == 0 or self.rng.random() < 0.5):
            self.resumed += 1
        else:
            first = next(self._fresh)
            operation = Operation("add", ids(range(first, first + 3)))
        self._ask(perform, path, operation)
        expected = after(state, operation)
        found = self._ask(read, path)
        if found != expected:
            raise WrongMemory(
                f"{path} after the next write, {operation}:\n{found}\nis not\n{expected}"
            )
        return found

    def close(self) -> None:
        """Ends the process that checks."""
        self._helper.kill()
        self._helper.join()


def _loaded_modules() -> list[str]:
    return [name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]


def _names(path: pathlib.Path) -> set[str]:
    return {str(file) for file in path.rglob("*") if file.name != ".memory-lock"}


def _received(channel: connection.Connection) -> float | None:
    """The seconds that a killed process has sent, if it had come so far."""
    try:
        return channel.recv()
    except EOFError:
        return None


def _next_estimate(typical: float, limit: float, seconds: float | None) -> float:
    """How long an operation takes, after one more that took `seconds` or was not done at `limit`."""
    if seconds is not None:
        return 0.8 * typical + 0.2 * seconds
    return typical * (1.2 if limit > typical else 1.0)


def _experiment(
    channel: connection.Connection, folder: pathlib.Path, num_kills: int, seed: list[int]
) -> None:
    """Runs an experiment; sends what it counted, and what failed or None."""
    experiment = Experiment(folder, np.random.default_rng(seed))
    failure = None
    try:
        experiment.run(num_kills)
    except WrongMemory as error:
        failure = str(error)
    finally:
        experiment.close()
    channel.send((experiment.counts, experiment.resumed, failure))


def run(folder: pathlib.Path, num_kills: int, num_processes: int, seed: int) -> dict[str, Any]:
    """The experiment in several processes at a time; see this file's description.

    Args:
        folder: does not exist.
        num_kills: in all, a multiple of `num_processes`.
        num_processes: how many memories are changed at a time.
        seed: chooses changes and instants.

    Returns:
        `kills`, `outcomes` (operation -> outcome -> number), `resumed` (how many next writes completed the
        killed change) and `failures`, texts.
    """
    started = [
        start(_experiment, folder / str(i), num_kills // num_processes, [seed, i])
        for i in range(num_processes)
    ]
    answers = [channel.recv() for _, channel in started]
    for process, _ in started:
        process.join()
    counts = {
        name: {
            outcome: sum(found[name][outcome] for found, _, _ in answers) for outcome in OUTCOMES
        }
        for name in OPERATIONS
    }
    return {
        "kills": sum(sum(of.values()) for of in counts.values()),
        "outcomes": counts,
        "resumed": sum(resumed for _, resumed, _ in answers),
        "failures": [failure for _, _, failure in answers if failure is not None],
    }


def main() -> int:
    """The command of this file's description."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists() or arguments.kills % arguments.processes:
        parser.error("give a folder that does not exist, and a multiple of --processes as --kills")
    began = time.monotonic()
    summary = run(arguments.folder, arguments.kills, arguments.processes, arguments.seed)
    print(json.dumps({"seconds": round(time.monotonic() - began)} | summary, indent=1))
    return int(bool(summary["failures"]))


if __name__ == "__main__":
    sys.exit(main())
