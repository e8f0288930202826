"""Approximate search by ScaNN in host RAM: the one file that knows ScaNN and its hazards.

Each guard answers one of design.md section 3: a NaN row aborts the process at build, missing hits
come back as index 0 with distance NaN, `k` above the reorder size is cut silently, ids saved by
ScaNN are unpickled, nothing is checksummed, and `import scann` breaks beside most TensorFlows.
"""

import dataclasses
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory import index

# The files of an index with asymmetric hashing; a folder that holds others is refused.
_ASSETS = {
    "ah_codebook.pb": "AH_CENTERS",
    "hashed_dataset.npy": "AH_DATASET_NPY",
    "dataset.npy": "DATASET_NPY",
}
_CONFIG = "scann_config.pb"
_import_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """How to search.

    Attributes:
        scoring: `brute_force`, `hashed` (asymmetric hashing, then exact reordering), or `auto`:
            brute force below `min_hashed_rows`.
        min_hashed_rows: the size from which hashing is worth its error.
        num_reordered: how many hashed hits are scored exactly; raised where k asks for more.
        dims_per_block: dimensions that share one 4-bit code.
        anisotropic_threshold: of score-aware quantisation, ScaNN's `T` (arXiv 1908.10396).
    """

    scoring: Literal["auto", "brute_force", "hashed"] = "auto"
    min_hashed_rows: int = 20_000
    num_reordered: int = 200
    dims_per_block: int = 2
    anisotropic_threshold: float = 0.2

    def __post_init__(self):
        counts = (self.min_hashed_rows, self.num_reordered, self.dims_per_block)
        if self.scoring not in ("auto", "brute_force", "hashed"):
            raise ValueError(f"scoring is auto, brute_force or hashed, not {self.scoring!r}")
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"the counts of a ScannConfig are whole and positive: {counts}")
        if not isinstance(self.anisotropic_threshold, float):
            raise ValueError(f"the threshold is a float, not {self.anisotropic_threshold!r}")


class ScannIndex:
    """ScaNN over the inner product, with every call guarded.

    No SOAR: such an index crashes the process after some deletes.
    """

    kind = "scann"

    def __init__(self, config: ScannConfig | None = None):
        """Raises UserError where ScaNN is not installed, so that nobody embeds rows for nothing."""
        _load_scann()
        self._config = config or ScannConfig()
        self._rows: np.ndarray | None = None
        self._searcher: Any = None
        self._is_hashed = False

    @property
    def num_rows(self) -> int:
        """How many rows can be found."""
        return 0 if self._rows is None else len(self._rows)

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows, as the protocol says."""
        ops = _load_scann()
        rows = index.check_rows(embeddings)  # One NaN would abort the whole process.
        config = self._config
        self._is_hashed = len(rows) > 0 and (
            config.scoring == "hashed"
            or (config.scoring == "auto" and len(rows) >= config.min_hashed_rows)
        )
        self._rows, self._searcher = rows, None
        if not len(rows):
            return
        builder = ops.builder(rows, min(10, len(rows)), "dot_product")
        if self._is_hashed:
            builder = builder.score_ah(
                config.dims_per_block,
                anisotropic_quantization_threshold=config.anisotropic_threshold,
            ).reorder(config.num_reordered)
        else:
            builder = builder.score_brute_force()
        self._searcher = builder.build()

    def add(self, embeddings: np.ndarray) -> None:
        """As the protocol; everything is built again, so recall does not depend on the order."""
        if self._rows is None:
            self.build(embeddings)
            return
        embeddings = index.check_rows(embeddings, self._rows.shape[1])
        self.build(np.concatenate([self._rows, embeddings]))

    def search(self, queries: np.ndarray, k: int) -> index.Neighbors:
        """The best k rows of each query, as the protocol says."""
        dim = None if self._rows is None else self._rows.shape[1]
        queries = index.check_queries(queries, k, dim)
        num_hits = min(k, self.num_rows)
        if num_hits == 0 or len(queries) == 0:
            empty = np.zeros((len(queries), 0), np.float32)
            return index.pad_hits(empty, empty, k)
        # Twice k leaves the reordering something to reorder when k is near its size.
        reordered = max(self._config.num_reordered, 2 * num_hits) if self._is_hashed else None
        ids, scores = self._searcher.search_batched(queries, num_hits, reordered)
        ids, scores = np.asarray(ids).astype(np.int32), np.asarray(scores)
        missing = np.isnan(scores)
        ids = np.where(missing, index.MISSING, ids)
        scores = np.where(missing, -np.inf, scores)
        return index.pad_hits(ids, scores, k)

    def save(self, directory: Path) -> None:
        """Writes what `load` needs beside the rows."""
        directory.mkdir(parents=True, exist_ok=True)
        saved: dict[str, Any] = {
            "kind": self.kind,
            "rows": self.num_rows,
            "config": dataclasses.asdict(self._config),
            "files": {},
        }
        if self._is_hashed:
            self._searcher.serialize(str(directory), True)
            (directory / "scann_assets.pbtxt").unlink()  # `load` writes its own.
            names = sorted(os.listdir(directory))
            saved["files"] = {name: files.file_digest(directory / name) for name in names}
        files.write_json(directory / "index.json", saved)

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """As the protocol; ScaNN's own files reach its native reader only with digests right."""
        path = directory / "index.json"
        saved = files.read_json(path)
        try:
            kind, rows, digests = saved["kind"], saved["rows"], dict(saved["files"])
            config = ScannConfig(**saved["config"])
        except (TypeError, KeyError, ValueError):
            kind, rows, digests, config = None, None, {}, ScannConfig()
        if kind != self.kind or rows != len(embeddings):
            raise UserError(
                f"{path} does not describe a scann index over {len(embeddings)} rows: "
                "the memory is damaged, build it again."
            )
        self._config = config
        if not digests:
            self.build(embeddings)
            return
        ops = _load_scann()
        _check_files(directory, digests)
        assets = "\n".join(
            f'assets {{ asset_type: {kind} asset_path: "{name}" }}'
            for name, kind in _ASSETS.items()
        )
        # Not `load_searcher`: that one unpickles a file of ids where it finds one.
        native = ops.scann_pybind.ScannNumpy(str(directory), assets)
        self._searcher = ops.ScannSearcher(native)
        self._rows = index.check_rows(embeddings)
        self._is_hashed = True


def _check_files(directory: Path, digests: dict[str, str]) -> None:
    """Raises UserError unless the folder holds ScaNN's known files, each as it was saved."""
    known = {*_ASSETS, _CONFIG}
    for name in sorted(set(os.listdir(directory)) - known - {"index.json"}):
        raise UserError(f"{directory / name} is not a file of a scann index: remove it.")
    for name in sorted(known):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: build the memory again.")
        if files.file_digest(directory / name) != digests.get(name):
            raise UserError(f"{directory / name} was changed: build the memory again.")


def _load_scann() -> types.ModuleType:
    """ScaNN's functions over NumPy, imported so that no TensorFlow is touched.

    The package imports TensorFlow where it can and then loads an op library that fits one release
    of it alone; its core needs none. The hidden import is undone before returning.

    Raises:
        UserError: ScaNN is not installed.
    """
    with _import_lock:
        loaded = sys.modules.get("scann.scann_ops.py.scann_ops_pybind")
        if loaded is not None:
            return loaded
        absent = object()
        modules: dict[str, Any] = sys.modules
        tensorflow = modules.get("tensorflow", absent)
        modules["tensorflow"] = None
        try:
            from scann.scann_ops.py import scann_ops_pybind
        except ImportError as error:
            raise UserError(
                f"The index scann cannot be loaded here ({error}): "
                "install scann (Linux only), or use the index exact."
            ) from error
        finally:
            if tensorflow is absent:
                del modules["tensorflow"]
            else:
                modules["tensorflow"] = tensorflow
        return scann_ops_pybind
