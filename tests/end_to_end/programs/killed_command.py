"""The command `rag-mm`, ended by SIGKILL inside a phase of a stage: STAGE PHASE SEED WORDS..

The process dies at a random time after the phase begins, at the latest as it ends, so always inside it.
"""

import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Phase(NamedTuple):
    """Where a phase begins and ends, and at most how many seconds after its begin the process dies.

    A place is a function's name and whether it is before or after its call.
    """

    begin: str
    end: str
    seconds: float


PHASES = {
    "start-up": Phase("before main", "before stage", 4.0),
    "first step": Phase("after next_batch", "before reach", 1.0),
    "between steps": Phase("before reach", "after reach", 0.0),
    "saving a checkpoint": Phase("before save", "before checksums", 0.5),
    "writing its checksums": Phase("before checksums", "after checksums", 0.01),
    "evaluation": Phase("after fit", "before keep_last", 1.0),
    "publishing the stage": Phase("before keep_last", "before publish", 0.05),
    "between stages": Phase("after stage", "before next stage", 0.02),
}


class Killer:
    """Ends this process inside a phase of a stage."""

    def __init__(self, stage: str, phase: str, seed: int):
        self._stage, self._phase = stage, PHASES[phase]
        self._random = random.Random(seed)
        # After 1 to 30 steps of this process: with or without a checkpoint of its own behind it.
        self._count = self._random.randint(1, 30) if phase == "between steps" else 1
        self._current, self._is_begun = "", False

    def reach(self, place: str) -> None:
        """Reports that the process is at a place."""
        if place == self._phase.begin and self._is_there(place) and not self._is_begun:
            self._count -= 1
            if self._count == 0:
                self._is_begun = True
                threading.Thread(target=self._die_later, daemon=True).start()
        elif place == self._phase.end and self._is_begun:
            self._die()

    def _is_there(self, place: str) -> bool:
        return place == "before main" or self._current == self._stage

    def _die_later(self) -> None:
        time.sleep(self._random.uniform(0, self._phase.seconds))
        self._die()

    def _die(self) -> None:
        print("killed inside its phase", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def wrap(self, owner: Any, name: str, place: str) -> None:
        """Reports each call of a function."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def reported(*args: Any, **kwargs: Any) -> Any:
            self.reach(f"before {place}")
            result = function(*args, **kwargs)
            self.reach(f"after {place}")
            return result

        setattr(owner, name, reported)

    def wrap_stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Reports each stage, whose name is the second argument."""

        def reported(run: Any, stage: str, *args: Any) -> Any:
            self.reach("before next stage")
            self._current = stage
            self.reach("before stage")
            result = function(run, stage, *args)
            self.reach("after stage")
            return result

        return reported

    def wrap_replace(self, function: Callable[..., None]) -> Callable[..., None]:
        """Reports that a stage's manifest, the last one after `keep_last`, is about to be replaced."""

        def reported(source: Any, target: Any) -> None:
            if os.fspath(target).endswith(f"/{self._stage}/manifest.json"):
                self.reach("before publish")
            function(source, target)

        return reported


def main(stage: str, phase: str, seed: str, *words: str) -> int:
    """Runs the command; returns its exit code if it was not killed."""
    killer = Killer(stage, phase, int(seed))
    killer.reach("before main")
    from rag_mm.cli import main as command
    from rag_mm.core import checksums
    from rag_mm.stages import chain
    from rag_mm.train import checkpoint, loop, preemption

    killer.wrap(loop._Run, "next_batch", "next_batch")
    killer.wrap(preemption.Stop, "reach", "reach")
    killer.wrap(checkpoint.Checkpoints, "save", "save")
    killer.wrap(checksums, "write", "checksums")
    killer.wrap(loop, "fit", "fit")
    killer.wrap(checkpoint, "keep_last", "keep_last")
    chain._run_stage = killer.wrap_stage(chain._run_stage)
    os.replace = killer.wrap_replace(os.replace)
    return command.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
