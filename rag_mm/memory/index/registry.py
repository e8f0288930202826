"""Creates an index by the name that manifests and configs use."""

from pathlib import Path
from typing import TYPE_CHECKING

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.index import own_indexes
from rag_mm.memory.index.protocol import Index

if TYPE_CHECKING:
    from rag_mm.memory.index.scann_config import ScannConfig


def make_index(kind: str, scann: "ScannConfig | None" = None) -> Index:
    """An empty index.

    Args:
        kind: `exact`, `scann` or `device`.
        scann: settings of a `scann` index; None for the defaults.

    Raises:
        UserError: the kind is unknown, or ScaNN is not installed.
    """
    # Imported here, so that opening a memory loads neither jax nor ScaNN before a search needs them.
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
    """The settings of a saved ScaNN index, for the next version's index.

    None, for the defaults, for other kinds, and for an index that this user did not save, whose settings are
    not taken over.

    Raises:
        UserError: the index's description is damaged.
    """
    if kind != "scann" or not own_indexes.is_own(directory / "index.json"):
        return None
    from rag_mm.memory.index.scann_config import ScannConfig

    try:
        return ScannConfig(**files.read_object(directory / "index.json")["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{directory / 'index.json'} is damaged ({error}).") from error
