"""Prints the nearest of 100 rows to the first one by ScaNN, and checks that TensorFlow is left alone.

With the argument `tensorflow`, that package is imported first and must be the one loaded at the end;
without it, none may be loaded.
"""

import importlib
import sys

import numpy as np


def main(*imported_first: str) -> None:
    before = {name: importlib.import_module(name) for name in imported_first}
    from rag_mm.memory.index import scann

    index = scann.ScannIndex(scann.ScannConfig(scoring="hashed"))
    rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    index.build(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    print(index.search(rows[:1], 1).ids[0, 0])
    after = {name: sys.modules[name] for name in ("tensorflow",) if name in sys.modules}
    assert after == before, (after, before)


main(*sys.argv[1:])
