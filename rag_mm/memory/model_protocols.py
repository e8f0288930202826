"""The interfaces of a memory's retriever and image tokenizer, and the embedding views computed with them.

Views are the embeddings that can be searched: `image`, `text`, and `mixed`, the mean of the two rescaled to
unit length (docs/papers/ra_cm3.md#retrieval). A document with one modality has its embedding in every view.
The view `image` embeds the first picture alone, an image or the first frame of a video; `text` embeds all
texts, joined.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rag_mm.core import caption_text, document_types, image_files
from rag_mm.core.errors import UserError

VIEWS = ("image", "text", "mixed")


class Encoder(Protocol):
    """A frozen retriever: both towers of a CLIP.

    Attributes:
        dim: width D of the embeddings.
        fingerprint: identifies the weights; a memory accepts only the encoder that built it.
        image_size: side of the input images in pixels.
        image_batch, text_batch: images and texts in a full batch. Several processes that share the encoding
            take full batches each.
    """

    dim: int
    fingerprint: str
    image_size: int
    image_batch: int
    text_batch: int

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Unit-length embeddings, float32 [B, D]."""
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Unit-length embeddings, float32 [B, D], of uint8 [B, image_size, image_size, 3]."""
        ...


class ImageTokenizer(Protocol):
    """A frozen image tokenizer.

    Attributes:
        fingerprint, image_size, image_batch: as of `Encoder`.
    """

    fingerprint: str
    image_size: int
    image_batch: int

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes, int32 [B, N], of uint8 [B, image_size, image_size, 3]."""
        ...


def check_view(view: str) -> None:
    """Raises UserError unless `view` is one of `VIEWS`."""
    if view not in VIEWS:
        raise UserError(f"There is no view {view!r}: choose image, text or mixed.")


def embed(documents: Sequence[document_types.Document], encoder: Encoder) -> dict[str, np.ndarray]:
    """Embeds documents in every view: their first pictures, and their texts joined.

    Returns:
        Unit-length embeddings, float32 [len(documents), D], by view.

    Raises:
        UserError: a document has neither text nor image, or its embedding is not finite.
    """
    embeddings: dict[str, np.ndarray] = {}
    has_modality: dict[str, np.ndarray] = {}
    cleaned = {i: caption_text.clean(document.text) for i, document in enumerate(documents)}
    texts = {i: text for i, text in cleaned.items() if text}
    images = {
        i: image_files.fit(d.image, encoder.image_size)
        for i, d in enumerate(documents)
        if d.image is not None
    }
    for view, items, encode in (
        ("image", images, lambda: encoder.encode_image(np.stack(list(images.values())))),
        ("text", texts, lambda: encoder.encode_text(list(texts.values()))),
    ):
        embeddings[view] = np.zeros((len(documents), encoder.dim), np.float32)
        has_modality[view] = np.isin(np.arange(len(documents)), list(items))
        if items:
            names = [documents[i].id for i in items]
            embeddings[view][list(items)] = unit_rows(encode(), names)
    for i in np.flatnonzero(~has_modality["image"] & ~has_modality["text"]).tolist():
        raise UserError(f"Document {documents[i].id!r} has neither text nor image.")
    image = np.where(has_modality["image"][:, None], embeddings["image"], embeddings["text"])
    text = np.where(has_modality["text"][:, None], embeddings["text"], embeddings["image"])
    mixed = unit_rows((image + text) / 2, [d.id for d in documents])
    return {"image": image, "text": text, "mixed": mixed}


def encode_query(
    encoder: Encoder,
    *,
    text: str | Sequence[str] | None,
    image: image_files.AnyImage | Sequence[image_files.AnyImage] | None,
    document: document_types.Document | None,
    view: str,
) -> np.ndarray:
    """Unit-length query embeddings, float32 [Q, D], of the argument that is not None; see `Memory.encode`."""
    if text is not None:
        texts = [caption_text.clean(t) for t in ([text] if isinstance(text, str) else text)]
        return unit_rows(encoder.encode_text(texts), texts)
    if document is not None:
        check_view(view)
        return embed([document], encoder)[view]
    if image is None:
        raise UserError("A search needs a text, an image, a document or vectors.")
    given: Any = image
    is_one = not isinstance(given, list | tuple) and np.ndim(given) < 4
    images = [image_files.to_pixels(one) for one in ([given] if is_one else given)]
    pixels = np.stack([image_files.fit(one, encoder.image_size) for one in images])
    return unit_rows(encoder.encode_image(pixels), [f"image {i}" for i in range(len(pixels))])


def unit_rows(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Rescales embeddings [B, D] to unit length, float32.

    Raises:
        UserError: an embedding is zero or not finite; the message gives its name.
    """
    rows = np.asarray(rows, np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if bad.size:
        raise UserError(
            f"The embedding of {names[bad[0]]!r} is zero, NaN or infinite: "
            "the retriever's weights are damaged; train it again."
        )
    return rows / lengths
