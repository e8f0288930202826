"""What a memory needs of a retriever and an image tokenizer, and the views made with them.

Views are the embeddings that can be searched: `image`, `text`, and `mixed`, the mean of the two
rescaled to length 1 (RA-CM3 section 3.1). A document with one part has that part in every view.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rag_mm.core import document_types, image_files
from rag_mm.core.errors import UserError

VIEWS = ("image", "text", "mixed")
Item = TypeVar("Item")


class Encoder(Protocol):
    """A frozen retriever: both towers of a CLIP."""

    dim: int
    fingerprint: str
    image_size: int

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Unit rows, float32 [B, D]."""
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Unit rows, float32 [B, D], of uint8 [B, image_size, image_size, 3]."""
        ...


class ImageTokenizer(Protocol):
    """A frozen image tokenizer."""

    fingerprint: str
    image_size: int

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes, int32 [B, N], of uint8 [B, image_size, image_size, 3]."""
        ...


def check_view(view: str) -> None:
    """Raises UserError where there is no such view."""
    if view not in VIEWS:
        raise UserError(f"There is no view {view!r}: choose image, text or mixed.")


def embed(
    documents: Sequence[document_types.Document], encoder: Encoder, batch_size: int
) -> dict[str, np.ndarray]:
    """Embeds documents in every view: float32 [len(documents), D] unit rows.

    The encoder always sees `batch_size` items, so that it compiles once and a row does not depend
    on how many documents came with it.

    Raises:
        UserError: a document has neither text nor image, or its embedding is not finite.
    """
    parts: dict[str, np.ndarray] = {}
    present: dict[str, np.ndarray] = {}
    texts = {row: d.text for row, d in enumerate(documents) if d.text.strip()}
    pictures = {
        row: image_files.fit(d.image, encoder.image_size)
        for row, d in enumerate(documents)
        if d.image is not None
    }
    for view, items, encode in (
        ("image", pictures, lambda batch: encoder.encode_image(np.stack(batch))),
        ("text", texts, lambda batch: encoder.encode_text(list(batch))),
    ):
        parts[view] = np.zeros((len(documents), encoder.dim), np.float32)
        present[view] = np.isin(np.arange(len(documents)), list(items))
        if items:
            rows = _in_batches(encode, list(items.values()), batch_size)
            names = [documents[row].id for row in items]
            parts[view][list(items)] = unit_rows(rows, names)
    for row in np.flatnonzero(~present["image"] & ~present["text"]).tolist():
        raise UserError(f"Document {documents[row].id!r} has neither text nor image.")
    image = np.where(present["image"][:, None], parts["image"], parts["text"])
    text = np.where(present["text"][:, None], parts["text"], parts["image"])
    mixed = unit_rows((image + text) / 2, [d.id for d in documents])
    return {"image": image, "text": text, "mixed": mixed}


def encode_query(
    encoder: Encoder,
    *,
    text: str | Sequence[str] | None,
    image: np.ndarray | None,
    document: document_types.Document | None,
    view: str,
) -> np.ndarray:
    """Unit rows, float32 [Q, D], of what is not None; see `Memory.encode`."""
    if text is not None:
        texts = [text] if isinstance(text, str) else list(text)
        return unit_rows(encoder.encode_text(texts), texts)
    if document is not None:
        check_view(view)
        return embed([document], encoder, batch_size=1)[view]
    if image is None:
        raise UserError("A search needs a text, an image, a document or vectors.")
    stack = image[None] if image.ndim == 3 else image
    pixels = np.stack([image_files.fit(picture, encoder.image_size) for picture in stack])
    return unit_rows(encoder.encode_image(pixels), [f"picture {i}" for i in range(len(pixels))])


def unit_rows(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Rows [B, D] rescaled to length 1, float32.

    Raises:
        UserError: a row is zero or not finite; the sentence gives its name.
    """
    rows = np.asarray(rows, np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if bad.size:
        raise UserError(
            f"The embedding of {names[bad[0]]!r} is zero, NaN or infinite: "
            "the retriever's weights are broken, train it again."
        )
    return rows / lengths


def encode_codes(
    documents: Sequence[document_types.Document], tokenizer: ImageTokenizer, batch_size: int
) -> list[np.ndarray | None]:
    """Codes, int32 [N], of each document's first image; None for a document without one."""
    pictures = {
        row: image_files.fit(d.image, tokenizer.image_size)
        for row, d in enumerate(documents)
        if d.image is not None
    }
    codes: list[np.ndarray | None] = [None] * len(documents)
    if pictures:
        encoded = _in_batches(
            lambda batch: tokenizer.encode(np.stack(batch)), list(pictures.values()), batch_size
        )
        for row, values in zip(pictures, encoded, strict=True):
            codes[row] = np.asarray(values, np.int32)
    return codes


def _in_batches(
    encode: Callable[[Sequence[Item]], np.ndarray], items: Sequence[Item], batch_size: int
) -> np.ndarray:
    found = []
    for start in range(0, len(items), batch_size):
        batch = list(items[start : start + batch_size])
        padding = [batch[-1]] * (batch_size - len(batch))
        found.append(np.asarray(encode(batch + padding))[: len(batch)])
    return np.concatenate(found)
