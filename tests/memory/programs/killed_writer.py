"""Builds the memory PATH or adds to it (ACTION: build | add), and kills itself on the way.

WHEN: `batch`, after the second batch; `manifest`, before the manifest is written; `switch`, before the
new version becomes the current one.
"""

import os
import signal
import sys

from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import writer


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


ACTION, WHEN, PATH = sys.argv[1:]
options = writer.Options(index="exact", batch_size=4, shard_size=6)
if WHEN == "batch":
    options = writer.Options("exact", None, 4, 6, lambda done, _: done > 8 and die())
elif WHEN == "switch":
    manifest.switch = die
else:
    manifest.write = die
if ACTION == "build":
    retrieval_memory.Memory.build(PATH, make_documents(15), StandInEncoder(), options=options)
else:
    opened = retrieval_memory.Memory.open(PATH, StandInEncoder())
    opened.add(make_documents(15, 15), options=options)
