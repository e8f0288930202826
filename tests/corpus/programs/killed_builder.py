"""Builders that kill themselves with SIGKILL, one per point, in FOLDER/POINT; prints the signals."""

import json
import os
import pathlib
import signal
import sys

from corpus_cases import build, documents

from rag_mm.corpus import corpus_shard, folder_parts, write_corpus
from rag_mm.memory.writing import ingest_report

# Where a builder dies: at which call of what.
POINTS = {
    "in a shard": (corpus_shard.ShardDraft, "_tokens", 6),
    "shard written": (corpus_shard.ShardDraft, "write", 2),
    "shard marked": (folder_parts, "_write", 2),
    "report written": (ingest_report, "write_counts", 1),
    "tokenizer copied": (write_corpus, "_carry", 1),
}


def _die_after(owner, name: str, calls: int) -> None:
    original, left = getattr(owner, name), [calls]

    def dying(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def main(folder: pathlib.Path) -> None:
    ended = {}
    for point, where in POINTS.items():
        child = os.fork()
        if child == 0:
            try:
                _die_after(*where)
                build(folder / point, documents(15))
            finally:
                os._exit(1)
        ended[point] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1
    print(json.dumps(ended))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
