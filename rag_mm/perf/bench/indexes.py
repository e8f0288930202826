"""Our indexes compared with FAISS: queries per second at equal recall, build time, size, resident memory."""

import dataclasses
import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.core import costs
from rag_mm.memory.index import device, exact, protocol, scann
from rag_mm.memory.index.protocol import Index
from rag_mm.memory.index.scann_config import ScannConfig
from rag_mm.perf.bench import faiss_peer, timing
from rag_mm.perf.bench.vectors import Cones

_K = 10
_BATCH = 256
_SINGLES = 64  # Queries timed one by one.
_BLOCK = 65_536  # Rows per block of the exact search.
_WARM_ROWS = 2_048


@dataclasses.dataclass(frozen=True)
class IndexBenchConfig:
    """Configuration of the benchmark.

    Attributes:
        rows, dim: size of the memory. recall: recall@10 that both sides must reach. num_queries: queries for
        the recall; timings use a subset. num_threads: threads of both sides. num_rounds: timing rounds; the
        median is reported. device_rows: maximal rows for comparing `device` with a plain JAX program and
        `exact` with FAISS's flat
            index, whose throughput only falls with more rows.
        with_hnsw: also compare with FAISS HNSW, which takes several times longer to build.
        num_small: rows of a second, smaller build for the scaling case; 0 disables it.
    """

    rows: int = 300_000
    dim: int = 512
    recall: float = 0.95
    num_queries: int = 1_024
    num_threads: int = 2
    num_rounds: int = 5
    device_rows: int = 100_000
    with_hnsw: bool = False
    num_small: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    rows: np.ndarray
    queries: np.ndarray
    true_ids: np.ndarray  # Ids of the exact neighbors.


def run(
    config: IndexBenchConfig, say: Callable[[str], None] = lambda line: None
) -> dict[str, Mapping[str, Any]]:
    """All cases, each `{"ours", "peer", "ratio", "unit", ...}` with machine and versions.

    A ratio above 1 means that ours is better: ours / peer where higher is better, otherwise peer / ours.
    """
    with timing.on_threads(config.num_threads):
        cases = _run(config, say)
    made_on = costs.machine()
    common = {
        "machine": f"{made_on['processor']}, {config.num_threads} of {made_on['cores']} cores",
        "versions": {
            "faiss": faiss_peer.version(),
            **{name: importlib.metadata.version(name) for name in ("scann", "jax", "numpy")},
        },
    }
    return {name: {**case, **common} for name, case in cases.items()}


def _run(config: IndexBenchConfig, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    say(f"{config.rows} x {config.dim} rows and {config.num_queries} queries")
    cones = Cones(dim=config.dim)
    rows, queries = cones.rows(config.rows), cones.queries(config.num_queries)
    data = _Data(rows, queries, true_neighbors(rows, queries, _K))
    cases = {"exact": _exact(config, data)}
    _warm_up(config, rows)
    say("building ours")
    ours, build = _timed(lambda: _build(rows), rows)
    cases |= {"wrapper": _wrapper(config, ours, data)}
    for name, make in _peers(config).items():
        say(f"building {name}")
        (index, candidates), peer_build = _timed(
            functools.partial(make, rows, config.num_threads), rows
        )
        cases |= _compare(config, ours, (name, index, candidates), data, build, peer_build)
        del index, candidates
    del ours  # Frees memory, which is scarce at the larger sizes.
    if config.num_small:
        say("building fewer rows")
        cases["scaling"] = _scaling(config, rows)
    say("device")
    cases["device"] = _device(config, data)
    return cases


def true_neighbors(
    rows: np.ndarray, queries: np.ndarray, k: int, block: int = _BLOCK
) -> np.ndarray:
    """Ids of the exact neighbors, int32 [Q, k]; searches block by block to avoid copying all rows."""
    best = protocol.Neighbors(
        np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), np.float32)
    )
    for start in range(0, len(rows), block):
        oracle = exact.ExactIndex()
        oracle.build(rows[start : start + block])
        hits = oracle.search(queries, min(k, oracle.num_rows))
        ids = np.concatenate([best.ids, hits.ids + np.int32(start)], axis=1)
        scores = np.concatenate([best.scores, hits.scores], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = protocol.Neighbors(
            np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
        )
    return best.ids


def _warm_up(config: IndexBenchConfig, rows: np.ndarray) -> None:
    """Loads both libraries and starts their threads, so that no build is charged for it."""
    sample = rows[: min(len(rows), _WARM_ROWS)]
    scann.ScannIndex(ScannConfig(scoring="hashed")).build(sample)
    for make in _peers(config).values():
        make(sample, config.num_threads)


def _peers(config: IndexBenchConfig) -> dict[str, Callable]:
    peers: dict[str, Callable] = {"ivf": faiss_peer.build_ivf}
    return peers | ({"hnsw": faiss_peer.build_hnsw} if config.with_hnsw else {})


def _build(rows: np.ndarray) -> scann.ScannIndex:
    index = scann.ScannIndex()
    index.build(rows)
    return index


def _timed(make: Callable[[], Any], rows: np.ndarray) -> tuple[Any, dict[str, float]]:
    """The result of `make`; its seconds, and peak resident memory relative to the rows' size."""
    timing.reset_peak_memory()
    before = timing.resident_memory(peak=False)
    start = time.perf_counter()
    result = make()
    seconds = time.perf_counter() - start
    extra = timing.resident_memory(peak=True) - before
    return result, {"seconds": seconds, "memory": (rows.nbytes + extra) / rows.nbytes}


def _recall(ids: np.ndarray, true_ids: np.ndarray) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(true_ids, ids, strict=True)]))


def _ratio(ours: float, peer: float, unit: str, higher_is_better: bool, **extra: Any) -> dict:
    ratio = ours / peer if higher_is_better else peer / ours
    return {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, **extra}


def _compare(
    config: IndexBenchConfig,
    ours: scann.ScannIndex,
    peer: tuple[str, object, list[faiss_peer.Candidate]],
    data: _Data,
    build: Mapping[str, float],
    peer_build: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Search, build, size and memory compared with one peer."""
    name, index, candidates = peer
    best, peer_recall = _tune(config, candidates, data)
    recalls = {
        "our_recall": _recall(ours.search(data.queries, _K).ids, data.true_ids),
        "peer_recall": peer_recall,
        "peer_setting": best.name,
    }
    cases = {}
    for batch, count in ((_BATCH, len(data.queries)), (1, min(_SINGLES, len(data.queries)))):
        batches = [data.queries[i : i + batch] for i in range(0, count, batch)]
        seconds = timing.alternate(
            [
                functools.partial(_search_all, ours.search, batches),
                functools.partial(_search_all, best.search, batches),
            ],
            config.num_rounds,
        )
        cases[f"{name}_batch_{batch}"] = _ratio(
            count / seconds[0], count / seconds[1], "queries/s", True, **recalls
        )
    cases[f"{name}_build"] = _ratio(build["seconds"], peer_build["seconds"], "s", False)
    cases[f"{name}_bytes"] = _ratio(
        _num_bytes(ours) / config.rows,
        faiss_peer.num_bytes(index) / config.rows,
        "bytes/row",
        False,
    )
    cases[f"{name}_memory"] = _ratio(
        build["memory"], peer_build["memory"], "resident at build / raw rows", False
    )
    return cases


def _tune(
    config: IndexBenchConfig, candidates: list[faiss_peer.Candidate], data: _Data
) -> tuple[faiss_peer.Candidate, float]:
    """The fastest setting that reaches the target recall, or the most accurate one if none does."""
    recalls, seconds = [], []
    for candidate in candidates:
        start_time = time.perf_counter()
        batches = range(0, len(data.queries), _BATCH)
        ids = [candidate.search(data.queries[start : start + _BATCH], _K) for start in batches]
        seconds.append(time.perf_counter() - start_time)
        recalls.append(_recall(np.concatenate(ids), data.true_ids))
    accurate = [i for i, recall in enumerate(recalls) if recall >= config.recall]
    best = min(accurate, key=seconds.__getitem__) if accurate else int(np.argmax(recalls))
    return candidates[best], recalls[best]


def _search_all(search: Callable[[np.ndarray, int], Any], batches: Sequence[np.ndarray]) -> None:
    for batch in batches:
        search(batch, _K)


def _num_bytes(index: Index) -> int:
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _exact(config: IndexBenchConfig, data: _Data) -> dict[str, Any]:
    """`exact` compared with FAISS's flat index."""
    faiss = faiss_peer.load()
    faiss.omp_set_num_threads(config.num_threads)
    rows = data.rows[: config.device_rows]
    oracle, flat = exact.ExactIndex(), faiss.IndexFlatIP(config.dim)
    oracle.build(rows)
    flat.add(rows)
    queries = data.queries[:_BATCH]
    seconds = timing.alternate(
        [lambda: oracle.search(queries, _K), lambda: flat.search(queries, _K)], config.num_rounds
    )
    count = len(queries)
    return _ratio(count / seconds[0], count / seconds[1], "queries/s", True, rows=len(rows))


def _wrapper(config: IndexBenchConfig, ours: scann.ScannIndex, data: _Data) -> dict[str, Any]:
    """Our search compared with a direct ScaNN call with the same settings."""
    bare = ours.native()
    batches = [data.queries[i : i + _BATCH] for i in range(0, len(data.queries), _BATCH)]
    seconds = timing.alternate(
        [
            functools.partial(_search_all, ours.search, batches),
            functools.partial(_search_all, bare, batches),
        ],
        2 * config.num_rounds,
    )
    count = len(data.queries)
    return _ratio(count / seconds[0], count / seconds[1], "queries/s", True)


def _scaling(config: IndexBenchConfig, rows: np.ndarray) -> dict[str, Any]:
    """Build time per row at full size divided by that at `num_small` rows: ours, and FAISS's."""
    growth = []
    for make in (_build, lambda part: faiss_peer.build_ivf(part, config.num_threads)):
        seconds = []
        for count in (config.num_small, len(rows)):
            part = rows[:count]
            _, cost = _timed(functools.partial(make, part), part)
            seconds.append(cost["seconds"] / count)
        growth.append(seconds[1] / seconds[0])
    return _ratio(growth[0], growth[1], "s/row at full size over s/row at num_small", False)


def _device(config: IndexBenchConfig, data: _Data) -> dict[str, Any]:
    """The index compared with a plain JAX program on one device: scores, then top k."""
    rows = data.rows[: config.device_rows]
    index = device.DeviceIndex()
    index.build(rows)
    queries = data.queries[:_BATCH]

    @jax.jit
    def bare(rows: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
        values, ids = jax.lax.top_k(scores, _K)
        return values, ids

    placed = jnp.asarray(rows)
    seconds = timing.alternate(
        [
            lambda: index.search(queries, _K),
            lambda: jax.block_until_ready(bare(placed, jnp.asarray(queries))),
        ],
        2 * config.num_rounds,
    )
    _, ids = bare(placed, jnp.asarray(queries))
    recall = _recall(index.search(queries, _K).ids, np.asarray(ids))
    count = len(queries)
    return _ratio(
        count / seconds[0], count / seconds[1], "queries/s", True, our_recall=recall, rows=len(rows)
    )
