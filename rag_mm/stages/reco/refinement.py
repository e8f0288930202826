"""RECO at inference: retrieves neighbors of a query embedding and fuses them into it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rag_mm.core import batches
from rag_mm.core.errors import UserError
from rag_mm.memory import policy, retrieval_memory
from rag_mm.memory.index import protocol
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.store.mapped_rows import MappedRows
from rag_mm.models import reco
from rag_mm.stages.reco.embed_pairs import Pairs
from rag_mm.stages.shared import frozen

RETRIEVAL_OVERRIDES = ("none", "query", "random")
# Above any cosine, so that no row is skipped as a near-duplicate.
NO_BOUND = 2.0
_EXTRA_HITS = 8  # Hits searched beyond k, since the query's own row may be among them.
_EXTRA_HITS_WITH_BOUND = 64  # More, since near-duplicates are skipped.


class Bank:
    """The embeddings of a memory's images and texts, and an index of each."""

    def __init__(
        self,
        columns: Mapping[str, np.ndarray | MappedRows],
        indexes: Mapping[str, protocol.Index] | None = None,
    ):
        """Takes the columns `image` and `text`, float32 [N, D], and their indexes (exact if None)."""
        self.columns = columns
        self._indexes = dict(indexes or {})

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "Bank":
        """A bank of pairs, with exact indexes."""
        return cls({"image": pairs.image, "text": pairs.text})

    @classmethod
    def of_memory(cls, memory: retrieval_memory.Memory) -> "Bank":
        """A bank of a memory on disk, with the memory's indexes.

        Raises:
            UserError: the memory is empty or damaged.
        """
        if not len(memory):
            raise UserError(f"{memory.path} is empty; add documents to it first.")
        columns = {name: memory.embeddings(name) for name in reco.MODALITIES}
        return cls(columns, {name: memory.index(name) for name in reco.MODALITIES})

    def __len__(self) -> int:
        return len(self.columns["image"])

    def index(self, column: str) -> protocol.Index:
        """The index of a column, `image` or `text`."""
        if column not in self._indexes:
            exact = ExactIndex()
            exact.build(self.columns[column][:])
            self._indexes[column] = exact
        return self._indexes[column]


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievedRows:
    """Embeddings retrieved for Q queries.

    Attributes:
        table: float32 [N, D].
        ids: rows of `table`, int32 [Q, K], -1 for a missing neighbor.
    """

    table: np.ndarray | MappedRows
    ids: np.ndarray

    def take(self, queries: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors of some queries, float32 [Q, K, D], and which of them are present, bool [Q, K]."""
        ids = self.ids[queries]
        return self.table[ids], ids >= 0


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How neighbors are retrieved; every field may differ between training and inference.

    Attributes:
        image: which column image queries search, and which they fuse.
        text: which column text queries search, and which they fuse.
        num_neighbors: memory rows retrieved per query (k).
        max_similarity: memory rows with a higher cosine to the query, or to a row already retrieved, are
            skipped as near-duplicates; 2.0 skips none.
        retrieval_override: `none`, or for comparison `query` (the query itself, k times) or `random` (random
            memory rows).
        seed: seed of the random rows.
    """

    image: reco.Lookup = dataclasses.field(default_factory=reco.Lookup)
    text: reco.Lookup = dataclasses.field(default_factory=reco.Lookup)
    num_neighbors: int = 10
    max_similarity: float = NO_BOUND
    retrieval_override: str = "none"
    seed: int = 0

    def __post_init__(self):
        if self.num_neighbors < 1:
            raise ValueError(f"num_neighbors is {self.num_neighbors}; give at least 1")
        if self.retrieval_override not in RETRIEVAL_OVERRIDES:
            known = ", ".join(RETRIEVAL_OVERRIDES)
            raise ValueError(
                f"retrieval_override must be one of {known}, not {self.retrieval_override!r}"
            )

    def find(
        self, bank: Bank, modality: str, queries: np.ndarray, query_rows: np.ndarray | None = None
    ) -> RetrievedRows:
        """Retrieves the neighbors of Q queries.

        Args:
            bank: embeddings of the memory.
            modality: modality of the queries, `image` or `text`.
            queries: embeddings of length 1, float32 [Q, D].
            query_rows: int [Q], the memory row of the query's own pair, which is never retrieved, or -1.
        """
        lookup: reco.Lookup = getattr(self, modality)
        searched, fused = lookup.columns(modality)
        shape = (len(queries), self.num_neighbors)
        if self.retrieval_override == "query":
            ids = np.broadcast_to(np.arange(len(queries), dtype=np.int32)[:, None], shape)
            return RetrievedRows(queries, ids)
        if self.retrieval_override == "random":
            rows = np.random.default_rng((self.seed, 7)).integers(len(bank), size=shape)
            return RetrievedRows(bank.columns[fused], rows.astype(np.int32))
        no_rows = np.full(len(queries), protocol.MISSING)
        neighbors = policy.find_neighbors(
            bank.index(searched).search,
            queries,
            bank.columns[searched],
            num_neighbors=self.num_neighbors,
            max_similarity=self.max_similarity,
            query_rows=no_rows if query_rows is None else query_rows,
            query_keys=np.full(len(queries), policy.NO_KEY),
            row_keys=np.full(len(bank), policy.NO_KEY),
            num_candidates=self.num_neighbors
            + (_EXTRA_HITS if self.max_similarity >= NO_BOUND else _EXTRA_HITS_WITH_BOUND),
        )
        return RetrievedRows(bank.columns[fused], neighbors.ids)


Fuse = Callable[..., Any]


class Refiner:
    """Refines embeddings of both modalities with a memory."""

    def __init__(self, fusions: Mapping[str, Fuse], bank: Bank, search: SearchSettings):
        """Takes a function (query, retrieved, neighbor_mask) for each modality, such as `reco.Fusion`."""
        self.fusions, self.bank, self.search = fusions, bank, search

    def refine(self, modality: str, queries: np.ndarray) -> np.ndarray:
        """Refines embeddings of length 1, float32 [Q, D]."""
        if not len(queries):
            return queries
        return fuse(self.fusions[modality], queries, self.search.find(self.bank, modality, queries))


def fuse(
    fusion: Fuse, queries: np.ndarray, retrieved: RetrievedRows, batch_size: int = 256
) -> np.ndarray:
    """Fuses the retrieved rows into the queries: float32 [Q, D] of length 1, in batches (`batches.split`)."""
    parts = [
        np.asarray(fusion(queries[rows], *retrieved.take(rows)))
        for rows in batches.split(len(queries), batch_size)
    ]
    return np.concatenate(parts)[: len(queries)]


def learned_fusions(model: frozen.LoadedModel) -> dict[str, Fuse]:
    """The trained fusion of each modality."""
    return {name: model.compile(f"refine_{name}") for name in reco.MODALITIES}


def mean_fusions() -> dict[str, Fuse]:
    """The plain mean of query and neighbors, for both modalities."""
    import jax

    return dict.fromkeys(reco.MODALITIES, jax.jit(reco.mean_fusion))


def is_refined(modality: str, refine: str) -> bool:
    """Whether `refine` (none, image, text or both) includes a modality.

    Raises:
        UserError: `refine` is none of these.
    """
    if refine not in reco.REFINE:
        raise UserError(f"refine must be one of {', '.join(reco.REFINE)}, not {refine!r}.")
    return refine in (modality, "both")
