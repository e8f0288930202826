"""The kinds of index by name, as manifests and configs write them."""

from pathlib import Path
from typing import TYPE_CHECKING

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.index.protocol import Index

if TYPE_CHECKING:
    from rag_mm.memory.index.scann_config import ScannConfig


def make_index(kind: str, scann: "ScannConfig | None" = None) -> Index:
    """An empty index.

    Args:
        kind: `exact`, `scann` or `device`.
        scann: how ScaNN searches, its defaults where None.

    Raises:
        UserError: there is no such kind, or ScaNN is not installed.
    """
    # Imported here: opening a memory must not start jax or ScaNN before a search needs one.
    if kind == "exact":
        from rag_mm.memory.index import exact

        return exact.ExactIndex()
    if kind == "scann":
        from rag_mm.memory.index import scann as scann_index

        return scann_index.ScannIndex(scann)
    if kind == "device":
        from rag_mm.memory.index import device

        return device.DeviceIndex()
    raise UserError(f"There is no index {kind!r}: choose scann, exact or device.")


def saved_scann(kind: str, directory: Path) -> "ScannConfig | None":
    """How a saved index of ScaNN searches, so that the next one does as it does; None for others.

    Raises:
        UserError: its description is damaged.
    """
    if kind != "scann":
        return None
    from rag_mm.memory.index.scann_config import ScannConfig

    try:
        return ScannConfig(**files.read_json(directory / "index.json")["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{directory / 'index.json'} is damaged ({error}).") from error
