"""Search over rows sharded over the devices of a mesh, for memories larger than one host.

Each device scores its rows and keeps its best k hits; these are all-gathered and the best k of them returned.
A search thus communicates k hits per device and never a row.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.index import live_rows, protocol

_MAX_QUERIES = 256
_MIN_QUERIES = 8
_AXIS = "rows"


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Search settings.

    Attributes:
        recall_target: expected recall of `jax.lax.approx_max_k` on a TPU, in (0, 1]. With 1, and on other
            devices, top-k is exact.
        dtype: dtype of the rows on the devices. `auto` is bfloat16, but float32 on a CPU, where bfloat16 is
            slower.
    """

    recall_target: float = 0.95
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self):
        if not 0 < self.recall_target <= 1:
            raise ValueError(f"recall_target is {self.recall_target}; give a number in (0, 1]")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; give auto, bfloat16 or float32")


class DeviceIndex:
    """Rows sharded over all devices of a mesh, regardless of its axes."""

    kind = "device"

    def __init__(self, mesh: Mesh | None = None, config: DeviceConfig | None = None):
        """Uses the mesh's devices, or all local devices if `mesh` is None."""
        devices = np.asarray(jax.local_devices() if mesh is None else mesh.devices).reshape(-1)
        # A separate mesh with one axis: the rows' sharding is independent of any model's.
        self._mesh = Mesh(devices, (_AXIS,), axis_types=(AxisType.Auto,))
        config = config or DeviceConfig()
        if config.dtype == "auto":
            is_cpu = devices[0].platform == "cpu"
            config = dataclasses.replace(config, dtype="float32" if is_cpu else "bfloat16")
        self._config = config
        self._host_rows: np.ndarray | None = None
        self._live: live_rows.LiveRows | None = None
        self._rows: jax.Array | None = None
        self._mask: jax.Array | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, excluding removed ones."""
        return 0 if self._live is None else len(self._live)

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows and copies each device's part to it; see `Index.build`."""
        rows = protocol.check_rows(embeddings)
        padded = _round_up(max(len(rows), 1), self._mesh.size)
        dtype = jnp.dtype(self._config.dtype)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(padded)
            values = np.zeros((stop - start, rows.shape[1]), dtype)
            values[: max(0, len(rows) - start)] = rows[start:stop]
            return values

        sharding = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._host_rows = rows
        self._rows = jax.make_array_from_callback((padded, rows.shape[1]), sharding, part)
        self._set_live(live_rows.LiveRows(len(rows)))

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows; see `Index.add`."""
        if self._host_rows is None or self._live is None:
            self.build(embeddings)
            return
        embeddings = protocol.check_rows(embeddings, self._host_rows.shape[1])
        self.build(np.concatenate([self._host_rows[self._live.stored], embeddings]))

    def remove(self, ids: np.ndarray) -> None:
        """Removes rows without copying the others; see `Index.remove`."""
        self._set_live(protocol.require_rows(self._live).without(ids))

    def _set_live(self, live: live_rows.LiveRows) -> None:
        assert self._rows is not None
        self._live, self._mask = live, None
        if len(live) == self._rows.shape[0]:
            return
        mask = np.zeros(self._rows.shape[0], bool)
        mask[: live.num_stored] = live.mask
        sharding = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._mask = jax.device_put(mask, sharding)

    def search(self, queries: np.ndarray, k: int) -> protocol.Neighbors:
        """The best k rows for each query; see `Index.search`. Scores are accumulated in float32."""
        dim = None if self._host_rows is None else self._host_rows.shape[1]
        queries = protocol.check_queries(queries, k, dim)
        return protocol.search_batches(self._search_batch, self._live, queries, k, _MAX_QUERIES)

    def _search_batch(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        bucket = max(_MIN_QUERIES, 1 << (len(queries) - 1).bit_length())
        padded = np.zeros((bucket, queries.shape[1]), jnp.dtype(self._config.dtype))
        padded[: len(queries)] = queries
        is_masked = self._mask is not None
        search = make_search(self._mesh, k, self._config.recall_target, is_masked)
        masks = (self._mask,) if is_masked else ()
        ids, scores = search(padded, self._rows, *masks)
        return np.asarray(ids)[: len(queries)], np.asarray(scores)[: len(queries)]

    def save(self, directory: Path) -> None:
        """Writes the index's description; see `Index.save`."""
        saved = {"kind": self.kind, "rows": self.num_rows, **dataclasses.asdict(self._config)}
        files.write_json(directory / "index.json", saved)

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """Reads what `save` wrote; see `Index.load`. The dtype is chosen for this machine, not read."""
        path = directory / "index.json"
        saved = files.read_json(path)
        try:
            described = (saved["kind"], saved["rows"])
            config = DeviceConfig(saved["recall_target"], self._config.dtype)
        except (TypeError, KeyError, ValueError):
            described, config = (None, None), self._config
        if described != (self.kind, len(embeddings)):
            raise UserError(
                f"{path} does not describe a device index over {len(embeddings)} rows: "
                "the memory is damaged; build it again."
            )
        self._config = config
        self.build(embeddings)


@functools.lru_cache(maxsize=64)
def make_search(mesh: Mesh, k: int, recall_target: float, is_masked: bool = True) -> Any:
    """A compiled search over a mesh with one axis.

    Args:
        mesh: R rows are sharded over its axis; R is a multiple of its size.
        k: at most the number of unmasked rows.
        recall_target: see `DeviceConfig`.
        is_masked: whether the search takes a mask; without one it saves a pass over all scores.

    Returns:
        (queries [Q, D], rows [R, D], mask bool [R] if masked) -> ids int32 [Q, k] and scores float32
        [Q, k], replicated on every device, best first. With exact top-k, the smaller id comes first among
        equal scores.
    """
    (axis,) = mesh.axis_names
    if mesh.devices.flat[0].platform != "tpu":
        recall_target = 1.0  # Elsewhere `approx_max_k` sorts, which is slower than `top_k`.

    def search(
        queries_qd: jax.Array, rows_rd: jax.Array, mask_r: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        scores_qr = jnp.einsum(
            "qd,rd->qr",
            queries_qd,
            rows_rd,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        if mask_r is not None:
            scores_qr = jnp.where(mask_r[None, :], scores_qr, -jnp.inf)
        num_local = rows_rd.shape[0]
        scores, local_ids = _top_k(
            scores_qr, min(k, num_local), recall_target, num_local * mesh.size
        )
        if mesh.size == 1:
            return local_ids, scores
        ids = local_ids + num_local * jax.lax.axis_index(axis).astype(jnp.int32)
        # Gathered in device order, so that smaller ids come first among equal scores.
        scores = jax.lax.all_gather(scores, axis, axis=1, tiled=True)
        ids = jax.lax.all_gather(ids, axis, axis=1, tiled=True)
        scores, columns = jax.lax.top_k(scores, k)
        return jnp.take_along_axis(ids, columns, axis=1), scores

    sharded, replicated = PartitionSpec(axis), PartitionSpec()
    specs = (replicated, sharded, sharded) if is_masked else (replicated, sharded)
    mapped = jax.shard_map(
        search, mesh=mesh, in_specs=specs, out_specs=(replicated, replicated), check_vma=False
    )
    return jax.jit(mapped)


def _top_k(
    scores_qr: jax.Array, k: int, recall_target: float, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """One device's best k scores and their columns, int32; recall is relative to all `num_rows` rows."""
    if recall_target == 1:
        values, columns = jax.lax.top_k(scores_qr, k)
    else:
        values, columns = jax.lax.approx_max_k(
            scores_qr, k, recall_target=recall_target, reduction_input_size_override=num_rows
        )
    return values, columns


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
