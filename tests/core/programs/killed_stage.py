"""Runs a stage that counts to 3 in WORKDIR; kills itself after step KILL_AT (0: never)."""

import os
import signal
import sys
import time

from etils import epath

from rag_mm.core import costs, files, run_folder

costs._UPDATE_SECONDS = 0.05
WORKDIR, KILL_AT = epath.Path(sys.argv[1]), int(sys.argv[2])


def count(run, stage_dir):
    done = stage_dir / "done.txt"
    start = int(done.read_text()) if done.exists() else 0
    for step in range(start + 1, 4):
        files.write_atomic(done, str(step).encode())
        if step == KILL_AT:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
    return {"steps": 3}


run_folder.run_stage(run_folder.Run(WORKDIR), "count", {"n": 3}, (), count)
