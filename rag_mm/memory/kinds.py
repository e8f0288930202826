"""The kinds of index by name, as manifests and configs write them."""

from typing import TYPE_CHECKING

from rag_mm.core.errors import UserError
from rag_mm.memory.index import Index

if TYPE_CHECKING:
    from rag_mm.memory.scann_index import ScannConfig


def make_index(kind: str, scann: "ScannConfig | None" = None) -> Index:
    """An empty index.

    Args:
        kind: `exact` or `scann`.
        scann: how ScaNN searches, its defaults where None.

    Raises:
        UserError: there is no such kind, or ScaNN is not installed.
    """
    # Imported here: opening a memory must not start jax or ScaNN before a search needs one.
    if kind == "exact":
        from rag_mm.memory import exact

        return exact.ExactIndex()
    if kind == "scann":
        from rag_mm.memory import scann_index

        return scann_index.ScannIndex(scann)
    raise UserError(f"There is no index {kind!r}: choose scann or exact.")
