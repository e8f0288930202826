"""World of the user's own images and captions, with a split that is held out from training."""

import dataclasses
import functools
import zlib

import numpy as np

from rag_mm.core import image_files, progress
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents
from rag_mm.memory.writing import stream

_MAX_BAD_SHARE = 0.01  # As in `rag-mm memory build`: more bad records suggest a systematic problem.


@dataclasses.dataclass(frozen=True)
class OwnImages:
    """Documents read by `open_documents.open_documents`, kept in RAM with images resized for the models.

    A document's id decides its split: a share of `held_out_share` is held out, half of it as `tune` and half
    as `test`; the rest is `common`, and none is `rare_seen`. There are too few documents to divide them by
    role as well, so the same ones are used for training, in the memory and for testing; the retrieval policy
    ensures that none retrieves itself.

    Attributes:
        documents: a folder with captions.jsonl, tar files, or anything else that `--documents` accepts.
        image_size: height and width in pixels to which images are resized.
        held_out_share: share of documents that no stage trains on; the memory's first version lacks them too.
        digest: digest of the content of `documents` (for tar files, of names and sizes). It is computed, so
            that a changed folder is a different world.
    """

    documents: str
    image_size: int = 32
    held_out_share: float = 0.1
    digest: str = dataclasses.field(init=False, default="")

    def __post_init__(self):
        if not self.documents:
            raise ValueError(
                "documents is empty; name your folder with --config.world.documents=DIR"
            )
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; give at least 1")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; give more than 0, below 1")
        object.__setattr__(self, "digest", open_documents.digest(self.documents))

    def scenes(self, role: str, *split_names: str) -> "CaptionedImages":
        """The documents of some splits, the same ones in every role; `held_out` is tune and test."""
        documents = _read(self)
        num_held_out = min(max(2, round(self.held_out_share * len(documents))), len(documents) - 1)
        # Order by a digest of the id, so that adding a few documents moves few others to another split.
        order = sorted(
            documents, key=lambda document: (zlib.crc32(document.id.encode()), document.id)
        )
        parts = {
            "tune": order[: num_held_out // 2],
            "test": order[num_held_out // 2 : num_held_out],
            "common": order[num_held_out:],
        }
        parts["held_out"] = parts["tune"] + parts["test"]
        chosen = {doc.id for name in split_names for doc in parts.get(name, [])}
        return CaptionedImages([doc for doc in documents if doc.id in chosen])


class CaptionedImages:
    """Documents with one image and one caption each, as `world_config.SplitDocuments`; facts are unknown."""

    def __init__(self, documents: list[Document]):
        """Takes documents that have both an image and a text."""
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        """A document, its image resized for the models."""
        return self._documents[index]

    def image(self, index: int) -> np.ndarray:
        """The image of a document, uint8 [S, S, 3]."""
        pixels = self._documents[index].image
        assert pixels is not None
        return pixels

    def caption(self, index: int, caption_index: int) -> str:
        """The only caption of a document, whatever `caption_index` is."""
        return self._documents[index].text

    def full_caption(self, index: int) -> str:
        """The only caption of a document."""
        return self._documents[index].text

    def entity_mask(self, index: int) -> np.ndarray:
        """All True, bool [S, S]: where entities are is unknown."""
        return np.ones(self.image(index).shape[:2], bool)


@functools.lru_cache(maxsize=2)
def _read(world: OwnImages) -> list[Document]:
    """All valid documents.

    Raises:
        UserError: there are fewer than three, or more than one and more than 1 % of the records are bad.
    """
    source = open_documents.open_documents(world.documents)
    documents: dict[str, Document] = {}
    rejects: list[stream.Reject] = []
    num_cut = 0
    with progress.track("images", source.size or 0) as bar:
        for item in source.read(0):
            reject = item.reject or _reject(item.document, documents)
            if reject is not None:
                rejects.append(reject)
            elif item.document is not None and item.document.image is not None:
                documents[item.document.id] = _resize(item.document, world.image_size)
                num_cut += len(item.document.segments) > 2
            bar.update(len(documents) + len(rejects))
    first = f"; the first is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
    if (
        len(rejects) > max(1, _MAX_BAD_SHARE * (len(documents) + len(rejects)))
        or len(documents) < 3
    ):
        raise UserError(
            f"{world.documents} has {len(documents)} valid and {len(rejects)} bad records{first}"
        )
    if rejects:
        progress.say(f"{world.documents}: skipped {len(rejects)} bad records{first}")
    if num_cut:
        progress.say(
            f"{world.documents}: {num_cut} documents have several images or texts; training reads the first "
            "image, and all texts as its caption"
        )
    return list(documents.values())


def _reject(document: Document | None, earlier: dict[str, Document]) -> stream.Reject | None:
    if document is None:
        return None
    name = document.id
    if document.image is None or not document.text.strip():
        return stream.Reject(name, "one-sided", "lacks an image or a caption; training needs both")
    if name in earlier:
        return stream.Reject(name, "duplicate-id", f"has the id {name!r} of an earlier record")
    return None


def _resize(document: Document, size: int) -> Document:
    """The document with its text as one segment and its image resized to `size` x `size` pixels."""
    assert document.image is not None
    segments = (Text(document.text), Image(image_files.fit(document.image, size)))
    return dataclasses.replace(document, segments=segments)
