"""Holds the lock of the run WORKDIR for a minute; prints `held` once it has it."""

import sys
import time

from etils import epath

from rag_mm.core import run_folder

with run_folder.Run(epath.Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
