"""FAISS as the peer of our indexes, built as its guide recommends and tuned to a target recall."""

import dataclasses
import pathlib
import tempfile
import types
from collections.abc import Callable

import numpy as np

from rag_mm.core.errors import UserError

Search = Callable[[np.ndarray, int], np.ndarray]
# Search settings to try; the fastest one that reaches the target recall is the peer.
_PROBES = (8, 16, 24, 32, 48, 64)
_REFINES = (4, 8, 16)
_BREADTHS = (16, 32, 64, 128, 256, 512)


def load() -> types.ModuleType:
    """Imports FAISS.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("FAISS is not installed: pip install '.[bench]'.") from None
    return faiss


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A built index with one search setting."""

    name: str
    search: Search


def build_ivf(rows: np.ndarray, num_threads: int) -> tuple[object, list[Candidate]]:
    """IVF with 4-bit fast-scan PQ and exact refinement of float32 [R, D]: the index and its candidates."""
    faiss = load()
    faiss.omp_set_num_threads(num_threads)
    num_lists = 1 << max(4, round(float(np.log2(2 * np.sqrt(len(rows))))))
    spec = f"IVF{num_lists},PQ{rows.shape[1] // 2}x4fs,RFlat"
    index = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    index.train(rows[: min(len(rows), 64 * num_lists)])
    index.add(rows)

    def setting(probes: int, refine: int) -> Candidate:
        parameters = faiss.IndexRefineSearchParameters(
            k_factor=refine, base_index_params=faiss.SearchParametersIVF(nprobe=probes)
        )
        return Candidate(
            f"{spec} nprobe={probes} k_factor={refine}",
            lambda queries, k: index.search(queries, k, params=parameters)[1],
        )

    return index, [setting(probes, refine) for refine in _REFINES for probes in _PROBES]


def build_hnsw(rows: np.ndarray, num_threads: int) -> tuple[object, list[Candidate]]:
    """HNSW over float32 [R, D]: the index and its candidates."""
    faiss = load()
    faiss.omp_set_num_threads(num_threads)
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.add(rows)

    def setting(breadth: int) -> Candidate:
        parameters = faiss.SearchParametersHNSW(efSearch=breadth)
        return Candidate(
            f"HNSW32 efConstruction=80 efSearch={breadth}",
            lambda queries, k: index.search(queries, k, params=parameters)[1],
        )

    return index, [setting(breadth) for breadth in _BREADTHS]


def num_bytes(index: object) -> int:
    """Size of the serialized index."""
    with tempfile.TemporaryDirectory() as folder:  # In memory it would need twice the space.
        path = pathlib.Path(folder) / "index"
        load().write_index(index, str(path))
        return path.stat().st_size


def version() -> str:
    """The FAISS version."""
    return load().__version__
