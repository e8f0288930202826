"""A world of one's own: pictures and captions of a folder, split so that some are never trained on."""

import dataclasses
import functools
import json
import zlib

import numpy as np
from etils import epath

from rag_mm.core import digests, files, image_files, progress
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents
from rag_mm.memory.writing import stream

_MAX_BAD = 0.01  # As `rag-mm memory build`: more bad records say that something else is wrong.


@dataclasses.dataclass(frozen=True)
class OwnImages:
    """What `opening.open_documents` reads, held in RAM at the models' size.

    The split of a document follows from its id: `held_out_share` of them are `held_out`, the rest `common`,
    and none `rare_seen`. There are too few to be kept apart by role as well, so each document is trained
    on, lies in the memory and is asked about; that it never answers for itself is the policy's part.

    Attributes:
        documents: a folder with captions.jsonl, tars, or what else `--documents` names.
        image_size: pixels a side, to which pictures are fitted.
        held_out_share: of the documents; none of these is trained on, and the memory's first version
            lacks them.
        digest: of what `documents` holds (of tars, their names and sizes); made here, so that a changed
            folder is another world.
    """

    documents: str
    image_size: int = 32
    held_out_share: float = 0.1
    digest: str = ""

    def __post_init__(self):
        if not self.documents:
            raise ValueError(
                "documents is empty; name your folder with --config.world.documents=DIR"
            )
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}, give at least 1")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}, give more than 0, below 1")
        source = open_documents.open_documents(self.documents)
        # A folder's own fingerprint is of its captions alone.
        pixels = (
            digests.folder_digests(folder)
            if (folder := epath.Path(self.documents)).is_dir()
            else {}
        )
        whole = json.dumps([source.fingerprint, pixels], sort_keys=True)
        object.__setattr__(self, "digest", files.digest(whole.encode()))

    def scenes(self, role: str, *split_names: str) -> "Captioned":
        """The documents of some splits, the same in each role."""
        found = _read(self)
        num_held_out = min(max(1, round(self.held_out_share * len(found))), len(found) - 1)
        # By a digest of the id: a few documents more move few others to another split.
        order = sorted(found, key=lambda document: (zlib.crc32(document.id.encode()), document.id))
        held_out = {document.id for document in order[:num_held_out]}
        wanted = {"held_out": True, "common": False}
        kept = {wanted[name] for name in split_names if name in wanted}
        return Captioned([each for each in found if (each.id in held_out) in kept])


class Captioned:
    """Documents of one caption and one picture; what a caption leaves out nobody knows."""

    def __init__(self, documents: list[Document]):
        """Of documents with both."""
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        """The document, its picture at the models' size."""
        return self._documents[index]

    def picture(self, index: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        pixels = self._documents[index].image
        assert pixels is not None
        return pixels

    def caption(self, index: int, draw: int) -> str:
        """The same for each draw."""
        return self._documents[index].text

    def full_caption(self, index: int) -> str:
        """As `caption`."""
        return self._documents[index].text

    def entity_mask(self, index: int, patch: int = 4) -> np.ndarray:
        """All codes, bool [S / patch, S / patch]: nobody says where what stands."""
        side = len(self.picture(index)) // patch
        return np.ones((side, side), bool)


@functools.lru_cache(maxsize=2)
def _read(world: OwnImages) -> list[Document]:
    """All good documents.

    Raises:
        UserError: fewer than two, or more bad records than one and one in a hundred.
    """
    source = open_documents.open_documents(world.documents)
    found: dict[str, Document] = {}
    rejects: list[stream.Reject] = []
    with progress.track("pictures", source.size or 0) as bar:
        for item in source.read(0):
            reject = item.reject or _refuse(item.document, found)
            if reject is not None:
                rejects.append(reject)
            elif item.document is not None and item.document.image is not None:
                found[item.document.id] = _fit(item.document, world.image_size)
            bar.update(len(found) + len(rejects))
    first = f"; the first is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
    if len(rejects) > max(1, _MAX_BAD * (len(found) + len(rejects))) or len(found) < 2:
        raise UserError(
            f"{world.documents} has {len(found)} good and {len(rejects)} bad records{first}"
        )
    if rejects:
        progress.say(f"{world.documents}: passed over {len(rejects)} bad records{first}")
    return list(found.values())


def _refuse(document: Document | None, found: dict[str, Document]) -> stream.Reject | None:
    if document is None:
        return None
    name = document.id
    if document.image is None or not document.text.strip():
        return stream.Reject(name, "one-sided", "has no picture or no caption; training needs both")
    if name in found:
        return stream.Reject(name, "duplicate-id", f"has the id {name!r} of an earlier one")
    return None


def _fit(document: Document, size: int) -> Document:
    """One caption and one picture, of `size` pixels a side."""
    assert document.image is not None
    segments = (Text(document.text), Image(image_files.fit(document.image, size)))
    return dataclasses.replace(document, segments=segments)
