"""One native ScaNN searcher; the only file that calls ScaNN.

It works around these hazards: a NaN row aborts the process at build (callers check the rows), missing hits
are returned as index 0 with distance NaN, `k` above the reorder size is silently reduced, saved ids are
unpickled, files have no checksums, an index with SOAR crashes after deletes (so no searcher is changed in
place), `import scann` fails alongside most TensorFlow versions, and its log has no setting (it is dropped).
"""

import os
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import files, native_log
from rag_mm.core.errors import UserError
from rag_mm.memory.index import protocol
from rag_mm.memory.index.scann_config import ScannConfig

_CONFIG = "scann_config.pb"
# The files of an index and their asset types; a folder with other files is rejected.
_ASSETS = {
    "ah_codebook.pb": "AH_CENTERS",
    "serialized_partitioner.pb": "PARTITIONER",
    "datapoint_to_token.npy": "TOKENIZATION_NPY",
    "hashed_dataset.npy": "AH_DATASET_NPY",
    "hashed_dataset_soar.npy": "AH_DATASET_SOAR_NPY",
    "dataset.npy": "DATASET_NPY",
    "bfloat16_dataset.npy": "BF16_DATASET_NPY",
    "int8_dataset.npy": "INT8_DATASET_NPY",
    "int8_multipliers.npy": "INT8_MULTIPLIERS_NPY",
    "dp_norms.npy": "INT8_NORMS_NPY",
}
_QUERIES_PER_TASK = 64
_ROWS_PER_LEAF = 100  # Size of a tree's training sample, per leaf.
_import_lock = threading.Lock()


class Searcher:
    """Inner-product search over fixed rows."""

    def __init__(self, native: Any, num_rows: int, config: ScannConfig):
        """Used by `build` and `load`."""
        self._native = native
        self._num_rows = num_rows
        self._config = config
        self._num_threads = len(os.sched_getaffinity(0))
        native.set_num_threads(self._num_threads)

    @classmethod
    def build(cls, rows: np.ndarray, config: ScannConfig) -> "Searcher":
        """Builds a searcher over finite float32 [R, D], R >= 1; `config` must be resolved."""
        module = load_scann()
        builder = module.builder(rows, min(10, len(rows)), "dot_product")
        builder.set_n_training_threads(len(os.sched_getaffinity(0)))
        if config.scoring == "tree":
            builder = builder.tree(
                config.num_leaves,
                config.leaves_to_search,
                training_sample_size=_ROWS_PER_LEAF * config.num_leaves,
                # ScaNN's default of 50 is near the mean number of sampled rows per leaf, and would merge half
                # of the leaves into others.
                min_partition_size=min(10, max(1, len(rows) // (2 * config.num_leaves))),
                # Rows have unit length: spherical leaves reach the same recall with a third of the leaves.
                spherical=True,
                soar_lambda=config.soar_lambda or None,
            )
        if config.scoring == "brute_force":
            builder = builder.score_brute_force()
        else:
            reorder_types = sys.modules["scann.scann_ops.py.scann_builder"].ReorderType
            builder = builder.score_ah(
                config.dims_per_block,
                anisotropic_quantization_threshold=config.anisotropic_threshold,
                training_sample_size=config.training_sample_size,
            ).reorder(config.num_reordered, quantize=reorder_types[config.reorder.upper()])
        try:
            with native_log.dropped():
                native = builder.build()
            return cls(native, len(rows), config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"ScaNN cannot index these rows ({error}); use the index exact."
            ) from error

    @classmethod
    def load(
        cls, directory: Path, digests: Mapping[str, str], num_rows: int, config: ScannConfig
    ) -> "Searcher":
        """Loads what `save` wrote; the native reader sees the files only after their digests were checked.

        Raises:
            UserError: a file is missing, was changed, or does not belong to ScaNN.
        """
        module = load_scann()
        _check_files(directory, digests)
        assets = "\n".join(
            f'assets {{ asset_type: {kind} asset_path: "{name}" }}'
            for name, kind in _ASSETS.items()
            if name in digests
        )
        # `load_searcher` would unpickle a file of ids if there is one, so it is not used.
        try:
            with native_log.dropped():
                native = module.scann_pybind.ScannNumpy(str(directory), assets)
            return cls(module.ScannSearcher(native), num_rows, config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{directory} cannot be read by ScaNN ({error}); build it again."
            ) from error

    def save(self, directory: Path) -> dict[str, str]:
        """Writes ScaNN's files into an existing folder; returns their digests by name."""
        self._native.serialize(str(directory), True)
        (directory / "scann_assets.pbtxt").unlink()  # `load` writes its own.
        names = sorted({*_ASSETS, _CONFIG} & set(os.listdir(directory)))
        return {name: files.file_digest(directory / name) for name in names}

    def search(
        self, queries: np.ndarray, k: int, all_leaves: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [Q, k] and scores float32 [Q, k]; -1 and -inf if the searched leaves hold fewer rows.

        Args:
            queries: finite float32 [Q, D], Q >= 1.
            k: at most the number of rows.
            all_leaves: searches every leaf of a tree, so that no hit is missing.
        """
        native_ids, distances = self.native(queries, k, all_leaves)
        ids, scores = np.asarray(native_ids).astype(np.int32), np.asarray(distances)
        missing = np.isnan(scores)
        if missing.any():
            ids = np.where(missing, protocol.MISSING, ids)
            scores = np.where(missing, np.float32(-np.inf), scores)
        return ids, scores

    def native(self, queries: np.ndarray, k: int, all_leaves: bool = False) -> Any:
        """ScaNN's ids and distances, without checks."""
        config = self._config
        # At least 2 k hits are reordered, so that reordering still has a choice when k is large.
        reordered = max(config.num_reordered, 2 * k) if config.scoring != "brute_force" else None
        leaves = config.num_leaves if all_leaves and config.scoring == "tree" else None
        if self._num_threads > 1 and len(queries) > _QUERIES_PER_TASK:
            return self._native.search_batched_parallel(
                queries, k, reordered, leaves, _QUERIES_PER_TASK
            )
        return self._native.search_batched(queries, k, reordered, leaves)


def _check_files(directory: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError unless the folder holds exactly the listed ScaNN files, unchanged."""
    for name in sorted(set(os.listdir(directory)) - set(digests) - {"index.json"}):
        raise UserError(f"{directory / name} is not a file of a scann index: remove it.")
    for name in sorted(set(digests) - {*_ASSETS, _CONFIG}):
        raise UserError(f"{directory / name} is not a file of a scann index: remove it.")
    for name in sorted({_CONFIG, *digests}):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: build the memory again.")
        if files.file_digest(directory / name) != digests.get(name):
            raise UserError(f"{directory / name} was changed: build the memory again.")


def load_scann() -> types.ModuleType:
    """ScaNN's NumPy module, imported without TensorFlow.

    The package imports TensorFlow if it is installed and then loads an op library that fits only one release
    of it; the NumPy module does not need it. TensorFlow is hidden during the import and then restored.

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
                f"The index scann cannot be loaded ({error}): "
                "install scann (Linux only), or use the index exact."
            ) from error
        finally:
            if tensorflow is absent:
                del modules["tensorflow"]
            else:
                modules["tensorflow"] = tensorflow
        return scann_ops_pybind
