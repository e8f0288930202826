"""A trained autoencoder with its words, and how well each word fits an image."""

import dataclasses

import numpy as np
from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.models.spae import semantic
from rag_mm.stages.shared import frozen, given_models

FEATURES = "word_features.npy"  # Beside the tokenizer's parameters.


@dataclasses.dataclass(frozen=True)
class WordImages:
    """An image tokenizer whose codes are words.

    Attributes:
        tokenizer: images to codes and back.
        words: the word of each code; lower-case ASCII without spaces.
        retriever: the run's frozen retriever, None if its words have no features.
        features: the words' features in it, float32 [K, E], from all names.
    """

    tokenizer: frozen.FrozenTokenizer
    words: tuple[str, ...]
    retriever: frozen.FrozenRetriever | None
    features: np.ndarray | None

    def relative_scores(self, images: np.ndarray) -> np.ndarray | None:
        """How well each word fits each image, float32 [B, K] in 0..1, 1 for the best word.

        None without a retriever.
        """
        if self.retriever is None or self.features is None:
            return None
        embeddings = self.retriever.encode_image(images)
        return np.asarray(semantic.relative_scores(embeddings, self.features), np.float32)


def load(path: epath.PathLike) -> WordImages:
    """Loads the autoencoder of a run, of its stage `spae`, or of its frozen folder.

    Raises:
        UserError: there is none, or its codes are not words.
    """
    folder = given_models.find_model(path, "spae")
    tokenizer = frozen.FrozenTokenizer(folder)
    if tokenizer.words is None:
        raise UserError(
            f"{path} is an image tokenizer whose codes are no words; train one with a language codebook, "
            "such as configs/spae.py:aligned_table."
        )
    if not (folder / FEATURES).exists():
        return WordImages(tokenizer, tokenizer.words, None, None)
    retriever = frozen.FrozenRetriever(folder / frozen.GUIDE)
    return WordImages(tokenizer, tokenizer.words, retriever, files.read_array(folder / FEATURES))
