"""An encoder and an image tokenizer that need no training, and documents for them."""

import zlib

import numpy as np

from rag_mm.core.document_types import Document, Image, Text


class StandInEncoder:
    """Random projections of bags of words and of coarse colors: similar inputs have near embeddings."""

    dim = 24
    image_size = 8
    image_batch = text_batch = 4

    def __init__(self, fingerprint: str = "stand-in"):
        self.fingerprint = fingerprint
        self.batches = []
        self._projection = np.random.default_rng(0).normal(size=(8 * 8 * 3, self.dim))

    def encode_text(self, texts: list[str]) -> np.ndarray:
        self.batches.append(len(texts))
        rows = [sum(self._word(word) for word in ["", *text.split()]) for text in texts]
        return self._unit(np.stack(rows))

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (8, 8, 3)
        self.batches.append(len(pixels))
        return self._unit((pixels.reshape(len(pixels), -1) / 255.0 + 0.01) @ self._projection)

    def _word(self, word: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dim)

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class StandInTokenizer:
    """Codes are the brightness of each quadrant."""

    image_size = 8
    image_batch = 4

    def __init__(self, fingerprint: str = "stand-in codes"):
        self.fingerprint = fingerprint

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        quadrants = pixels.reshape(len(pixels), 2, 4, 2, 4, 3).mean(axis=(2, 4, 5))
        return quadrants.reshape(len(pixels), 4).astype(np.int32)


def make_documents(count: int, start: int = 0, size: int = 8) -> list[Document]:
    """Numbered documents, each with a caption and a random image that no other has."""
    documents = []
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        segments = (Text(f"thing number{i}"), Image(pixels))
        documents.append(Document(f"doc-{i:03d}", segments, url=f"http://x/{i}", license="CC0"))
    return documents
