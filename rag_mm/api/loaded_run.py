"""The loaded models and memory of a finished run, what they find and encode, and the results they give."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_mm.core import caption_text, image_files
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import coded_corpus, frozen

RetrievedDocuments = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImages:
    """Generated images, and the documents that the model read first.

    Attributes:
        images: uint8 [N, H, W, 3], RGB; H = W = the run's image size.
        neighbors: one {"id", "score", "text", "url", "license"} per document, best first. `score` is the
            cosine similarity to the query, None for a document passed in as `documents`.
        candidates: uint8 [N, M, H, W, 3], the M candidates of each image in the order they were made; None
            without `best_of`. With guidance and contrast both, they take turns, guidance first.
        scores: float32 [N, M], the cosine similarity of each candidate to the caption; None as `candidates`.
    """

    images: np.ndarray
    neighbors: RetrievedDocuments
    candidates: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedCaptions:
    """Captions, and the documents that the model read first.

    Attributes:
        captions: N texts, likeliest first: by mean log-probability per token, which is by perplexity, so that
            short captions have no advantage.
        mean_log_probs: the mean log-probability per token of each caption, in nats.
        neighbors: the documents read, as in `GeneratedImages`.
    """

    captions: list[str]
    mean_log_probs: list[float]
    neighbors: RetrievedDocuments


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedAnswers:
    """Answers to a question, and the documents that the model read first.

    Attributes:
        answers: N texts, likeliest first, as in `GeneratedCaptions`.
        mean_log_probs: the mean log-probability per token of each answer, in nats.
        neighbors: the documents read, as in `GeneratedImages`.
    """

    answers: list[str]
    mean_log_probs: list[float]
    neighbors: RetrievedDocuments


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRun:
    """What `rag_mm.load` loads of a finished run.

    Attributes:
        generator: the decoder, with its prompt layout and image-code vocabulary.
        image_tokenizer: images to codes and back.
        encoder: the retriever, images and texts to unit vectors.
        memory: the retrieval memory; see `rag_mm.memory.retrieval_memory.Memory`.
        rules: which documents retrieval skips as redundant, and whether it splits captions into phrases.
        tuned_on: the tasks that the decoder was tuned on (docs/papers/cm3leon.md); none for an untuned one.
    """

    generator: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    memory: Memory
    rules: policy.Rules = dataclasses.field(default_factory=policy.Rules)
    tuned_on: frozenset[str] = frozenset()

    def _similarity(self, prompt: str, images: np.ndarray) -> np.ndarray:
        """Cosine similarity of a caption to images uint8 [N, H, W, 3], float32 [N], by the retriever."""
        fitted = [image_files.fit(image, self.encoder.image_size) for image in images]
        embeddings = self.encoder.encode_image(np.stack(fitted))
        return (embeddings * self.encoder.encode_text([prompt])).sum(axis=1)

    def _text(self, prompt: str, what: str = "The prompt") -> list[int]:
        if not prompt.strip():
            raise UserError(f"{what} is empty; give a text.")
        layout = self.generator.layout
        ids, num_cut = token_documents.encode_text(
            self.image_tokenizer.vocabulary, prompt, layout.max_text_len
        )
        if num_cut:
            raise UserError(
                f"{what} has {len(ids) + num_cut} tokens, but the model takes at most "
                f"{layout.max_text_len}; shorten it."
            )
        return ids

    def _documents(
        self,
        given: Sequence[Document],
        count: int,
        query: dict[str, Any],
        query_codes: np.ndarray | None = None,
        num_pictures: int = 0,
    ) -> tuple[RetrievedDocuments, list[token_documents.Example]]:
        """The documents to condition on: best first for the report, best last for the model.

        `num_pictures` are given besides, and take the places of as many documents.
        """
        max_docs, documents = self.generator.layout.max_docs - num_pictures, list(given)
        if not 0 <= count <= max_docs or len(given) > max_docs:
            beside = " beside the given picture" if num_pictures else ""
            raise UserError(
                f"This model reads 0 to {max_docs} documents{beside}, not {len(given) or count}."
            )
        scores: list[float | None] = [None] * len(given)
        if not given and count:
            documents, scores = self._retrieve(query, count, query_codes)
        retrieved = [
            {
                "id": document.id,
                "score": score,
                "text": document.text,
                "url": document.url,
                "license": document.license,
            }
            for document, score in zip(documents, scores, strict=False)
        ]
        return retrieved, [self._example(document) for document in documents][::-1]

    def _retrieve(
        self, query: dict[str, Any], count: int, query_codes: np.ndarray | None
    ) -> tuple[list[Document], list[float | None]]:
        """Retrieves with the rules used in training; documents without an image are skipped."""
        counts = None
        if "text" in query:
            phrases, counts = policy.split_queries([query["text"]], self.rules.split_phrases)
            query = {"text": phrases}
        neighbors = policy.find_neighbors(
            self.memory.index("mixed").search,
            self.memory.encode(**query),
            self.memory.embeddings("mixed"),
            num_neighbors=4 * count,
            query_rows=np.array([-1]),
            query_keys=np.array([policy.NO_KEY]),
            row_keys=np.full(len(self.memory), policy.NO_KEY),
            counts=counts,
            **self.rules.bounds(self.memory.read_codes, query_codes),
        )
        present = neighbors.ids[0] >= 0
        documents = [self.memory.document(int(row)) for row in neighbors.ids[0][present]]
        pairs = zip(documents, neighbors.scores[0][present].tolist(), strict=True)
        with_image = [pair for pair in pairs if pair[0].image is not None][:count]
        return [document for document, _ in with_image], [score for _, score in with_image]

    def _example(self, document: Document) -> token_documents.Example:
        if document.image is None:
            raise UserError(f"Document {document.id!r} has no image, which this model needs.")
        return self._corpus().example(
            caption_text.clean(document.text), self._codes(document.image)[0]
        )

    def _corpus(self) -> coded_corpus.Corpus:
        return coded_corpus.Corpus(self.generator.layout, self.image_tokenizer)

    def _codes(self, image: np.ndarray) -> np.ndarray:
        """Codes int32 [1, N] of an image uint8 [H, W, 3] of any size."""
        pixels = image_files.fit(image, self.image_tokenizer.image_size)
        return self.image_tokenizer.encode(pixels[None])


def sampling_of(temperature: float, top_p: float) -> Sampling:
    """Temperature and top-p; UserError if one is out of range."""
    if not math.isfinite(temperature):
        raise UserError(f"temperature is {temperature}; give a finite number of at least 0.")
    try:
        return Sampling(temperature, top_p)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def check_count(name: str, value: int) -> None:
    """Raises UserError unless the value is at least 1."""
    if value < 1:
        raise UserError(f"{name} is {value}; give at least 1.")
