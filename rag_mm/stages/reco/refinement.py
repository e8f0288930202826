"""RECO at work: a memory's two columns, what a query finds in them, and the query refined by it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.memory import policy, retrieval_memory
from rag_mm.memory.index import protocol
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.models import reco
from rag_mm.stages.reco.embed_pairs import Pairs
from rag_mm.stages.shared import frozen

RETRIEVAL_OVERRIDES = ("none", "query", "random")
# More similar than any two unit rows are: nothing is a near copy.
NO_BOUND = 2.0
_SPARE = 8  # Hits beyond k, of which the query's own row may be one.
_FAR = 64


class Bank:
    """A memory as RECO sees it: float32 [N, D] unit rows of images and of the texts beside them."""

    def __init__(
        self, columns: Mapping[str, np.ndarray], indexes: Mapping[str, protocol.Index] | None = None
    ):
        """Takes `image` and `text`, and an index over each; exact ones are made if None."""
        self.columns = columns
        self._indexes = dict(indexes or {})

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "Bank":
        """Over embeddings in memory."""
        return cls({"image": pairs.image, "text": pairs.text})

    @classmethod
    def of_memory(cls, memory: retrieval_memory.Memory) -> "Bank":
        """Over a memory on disk, by its own indexes.

        Raises:
            UserError: the memory is empty or damaged.
        """
        if not len(memory):
            raise UserError(f"{memory.path} is empty, so nothing can be looked up in it.")
        columns = {name: memory.embeddings(name) for name in reco.MODALITIES}
        return cls(columns, {name: memory.index(name) for name in reco.MODALITIES})

    def __len__(self) -> int:
        return len(self.columns["image"])

    def index(self, column: str) -> protocol.Index:
        """What searches a column."""
        if column not in self._indexes:
            exact = ExactIndex()
            exact.build(self.columns[column])
            self._indexes[column] = exact
        return self._indexes[column]


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievedRows:
    """What queries retrieved: rows of a table, float32 [N, D], by number, int32 [Q, K], -1 for none."""

    table: np.ndarray
    ids: np.ndarray

    def take(self, queries: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Of some queries the rows, float32 [q, K, D], and which are there, bool [q, K]."""
        ids = self.ids[queries]
        return self.table[ids], ids >= 0


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How queries retrieve; every field may change without training again.

    Attributes:
        image: what image queries search and fuse.
        text: what text queries search and fuse.
        num_neighbors: memory rows retrieved per query (k).
        max_similarity: memory rows more similar than this to the query, or to one already retrieved, are
            skipped as near-duplicates; 2.0 skips none.
        retrieval_override: none, or for comparison: query retrieves the query itself k times, random
            retrieves random memory rows.
        seed: of the random rows.
    """

    image: reco.Lookup = dataclasses.field(default_factory=reco.Lookup)
    text: reco.Lookup = dataclasses.field(default_factory=reco.Lookup)
    num_neighbors: int = 10
    max_similarity: float = NO_BOUND
    retrieval_override: str = "none"
    seed: int = 0

    def __post_init__(self):
        if self.num_neighbors < 1:
            raise ValueError(f"num_neighbors is {self.num_neighbors}, give at least 1")
        if self.retrieval_override not in RETRIEVAL_OVERRIDES:
            known = ", ".join(RETRIEVAL_OVERRIDES)
            raise ValueError(
                f"retrieval_override is one of {known}, not {self.retrieval_override!r}"
            )

    def find(
        self, bank: Bank, modality: str, queries: np.ndarray, query_rows: np.ndarray | None = None
    ) -> RetrievedRows:
        """Looks up unit rows float32 [Q, D].

        Args:
            bank: the memory.
            modality: of the queries, `image` or `text`.
            queries: the embeddings.
            query_rows: int [Q], the row that is the query's own pair, or -1; it is never retrieved.
        """
        lookup: reco.Lookup = getattr(self, modality)
        searched, fused = lookup.columns(modality)
        shape = (len(queries), self.num_neighbors)
        if self.retrieval_override == "query":
            own = np.broadcast_to(np.arange(len(queries), dtype=np.int32)[:, None], shape)
            return RetrievedRows(queries, own)
        if self.retrieval_override == "random":
            drawn = np.random.default_rng((self.seed, 7)).integers(len(bank), size=shape)
            return RetrievedRows(bank.columns[fused], drawn.astype(np.int32))
        nothing = np.full(len(queries), protocol.MISSING)
        found = policy.find_neighbors(
            bank.index(searched).search,
            queries,
            bank.columns[searched],
            num_neighbors=self.num_neighbors,
            max_similarity=self.max_similarity,
            query_rows=nothing if query_rows is None else query_rows,
            query_keys=np.full(len(queries), policy.NO_KEY),
            row_keys=np.full(len(bank), policy.NO_KEY),
            num_candidates=self.num_neighbors
            + (_SPARE if self.max_similarity >= NO_BOUND else _FAR),
        )
        return RetrievedRows(bank.columns[fused], found.ids)


Fuse = Callable[..., Any]


class Refiner:
    """Refines embeddings of both modalities with one memory."""

    def __init__(self, fusions: Mapping[str, Fuse], bank: Bank, search: SearchSettings):
        """Takes a function (query, retrieved, is_there) for each modality, as `reco.Fusion`."""
        self.fusions, self.bank, self.search = fusions, bank, search

    def refine(self, modality: str, queries: np.ndarray) -> np.ndarray:
        """Unit rows float32 [Q, D], refined."""
        if not len(queries):
            return queries
        return fuse(self.fusions[modality], queries, self.search.find(self.bank, modality, queries))


def fuse(
    fusion: Fuse, queries: np.ndarray, found: RetrievedRows, batch_size: int = 256
) -> np.ndarray:
    """Fuses what was found into unit rows float32 [Q, D], some at a time."""
    parts = []
    for start in range(0, len(queries), batch_size):
        rows = np.arange(start, start + batch_size)
        # Beyond the end the last one again, so that it compiles once.
        rows = np.minimum(rows, len(queries) - 1)
        refined = np.asarray(fusion(queries[rows], *found.take(rows)))
        parts.append(refined[: len(queries) - start])
    return np.concatenate(parts)


def learned_fusions(mounted: frozen.LoadedModel) -> dict[str, Fuse]:
    """The trained fusion of each modality."""
    return {name: mounted.compile(f"refine_{name}") for name in reco.MODALITIES}


def mean_fusions() -> dict[str, Fuse]:
    """The plain mean for both."""
    import jax

    return dict.fromkeys(reco.MODALITIES, jax.jit(reco.mean_fusion))


def is_refined(modality: str, refine: str) -> bool:
    """Whether `refine` (none, image, text, both) covers a modality.

    Raises:
        UserError: there is no such choice.
    """
    if refine not in reco.REFINE:
        raise UserError(f"refine is one of {', '.join(reco.REFINE)}, not {refine!r}.")
    return refine in (modality, "both")
