"""Trains the run of `test_loop` in FOLDER; creates FOLDER/here and waits once PHASE is reached.

PHASE: `step` (number STEP), `eval` or `save` (at step 4), `compile` (the first step blocks the interpreter
for 20 seconds), or `never`. At the end the trained kernel is FOLDER/kernel.npy.
"""

import ctypes
import pathlib
import sys
import time

import numpy as np
from test_loop import SCHEDULE, begin

from rag_mm.train import loop

FOLDER, PHASE, STEP = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
PARTS = begin()
STEP_FN, SAVE = PARTS["step_fn"], loop.checkpoint.Checkpoints.save
steps_begun = 0


def wait_in(phase):
    if phase == PHASE:
        (FOLDER / "here").touch()
        time.sleep(1.0)


def slow_step(state, batch):
    global steps_begun
    steps_begun += 1
    if steps_begun == STEP:
        wait_in("step")
    if steps_begun == 1 and PHASE == "compile":
        (FOLDER / "here").touch()
        # As in a compilation, no Python bytecode runs: PyDLL keeps the interpreter's lock.
        ctypes.PyDLL(None).sleep(20)
    return STEP_FN(state, batch)


def watch(step, params):
    if step == 4:
        wait_in("eval")
    return {}


def slow_save(self, state, iterator, on_commit=None):
    if int(state.step) == 4:
        wait_in("save")
    SAVE(self, state, iterator, on_commit)


PARTS["step_fn"] = slow_step
loop.checkpoint.Checkpoints.save = slow_save
state, _ = loop.fit("line", directory=FOLDER / "run", config=SCHEDULE, watch=watch, **PARTS)
np.save(FOLDER / "kernel.npy", np.asarray(state.params["kernel"]))
