"""A finished run in the hand: draw, describe, fill in, search (the public face, `rag_mm.load`)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import compilation_cache, files, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import (
    coded_corpus,
    find_neighbors,
    frozen,
    train_retriever,
    train_tokenizer,
)

Found = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImages:
    """Drawn pictures, uint8 [N, H, W, 3], and the documents that were read first, best first.

    A document is {"id", "score", "text", "url", "license"}; `score` is None for one given by hand.
    """

    images: np.ndarray
    neighbors: Found


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedCaptions:
    """Captions with their log-probabilities in nats, likeliest first, and the documents read first."""

    captions: list[str]
    log_probs: list[float]
    neighbors: Found


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """Models and memory of a run, loaded."""

    generator: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    memory: Memory
    max_similarity: float  # of the retrieval policy; see `stages.neighbors`
    split_phrases: bool = False  # of the same

    def generate(
        self,
        prompt: str,
        *,
        docs: int = 2,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 0.95,
        best_of: int = 1,
    ) -> GeneratedImages:
        """Draws pictures of a caption.

        Args:
            prompt: the caption.
            docs: how many documents to retrieve for it, 0 for none.
            documents: read these instead of retrieving.
            num: pictures.
            seed: the same seed draws the same pictures.
            temperature, top_p: see `decode.sampler.Sampling`.
            best_of: candidates a picture; the one the retriever finds nearest to the caption is kept.

        Raises:
            UserError: an empty caption, a caption too long, or a value out of range.
        """
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        _check_count("best_of", best_of)
        text = self._text(prompt)
        found, examples = self._documents(documents, docs, {"text": prompt})
        wanted = self.encoder.encode_text([prompt])

        def draw(seeds: np.ndarray) -> tasks.SampledCodes:
            return tasks.generate_codes(
                self.generator, [text] * num, [examples] * num, seeds, sampling
            )

        def score(codes: np.ndarray) -> np.ndarray:
            return (self.encoder.encode_image(self.image_tokenizer.decode(codes)) * wanted).sum(
                axis=1
            )

        codes = tasks.best_of(draw, score, num, best_of, seed)
        return GeneratedImages(self.image_tokenizer.decode(codes), found)

    def caption(
        self,
        image: np.ndarray,
        *,
        docs: int = 2,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> GeneratedCaptions:
        """Puts a picture, uint8 [H, W, 3] of any size, into words; arguments as `generate`."""
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        codes = self.image_tokenizer.encode(
            image_files.fit(image, self.image_tokenizer.image_size)[None]
        )
        found, examples = self._documents(documents, docs, {"image": image})
        captions, log_probs = tasks.generate_captions(
            self.generator,
            np.repeat(codes, num, axis=0),
            [examples] * num,
            tasks.row_seeds(seed, num),
            sampling,
        )
        order = np.argsort(-log_probs, kind="stable")
        return GeneratedCaptions([captions[i] for i in order], log_probs[order].tolist(), found)

    def infill(
        self,
        image: np.ndarray,
        prompt: str,
        band: tuple[int, int],
        *,
        docs: int = 2,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 0.95,
    ) -> GeneratedImages:
        """Draws a band of a picture anew, seeing what is above and below it.

        The band is of whole rows, since a masked span is a run of codes in raster order.

        Args:
            image: uint8 [H, W, 3], fitted to the model's size first.
            prompt: the whole picture's caption.
            band: first row of pixels and the one after the last, multiples of a code's height.
            docs, documents, num, seed, temperature, top_p: as `generate`.

        Raises:
            UserError: as `generate`, or the band does not fall on codes.
        """
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        hole = self._hole(band)
        codes = self.image_tokenizer.encode(
            image_files.fit(image, self.image_tokenizer.image_size)[None]
        )[0]
        main = sequences.Example(self._text(prompt), codes)
        found, examples = self._documents(documents, docs, {"text": prompt})
        drawn = tasks.infill_codes(
            self.generator,
            [main] * num,
            hole,
            [examples] * num,
            tasks.row_seeds(seed, num),
            sampling,
        )
        return GeneratedImages(self.image_tokenizer.decode(drawn.codes), found)

    def _text(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise UserError("The prompt is empty; write a caption.")
        layout = self.generator.layout
        ids, num_cut = sequences.encode_text(layout, self.image_tokenizer.vocabulary, prompt)
        if num_cut:
            raise UserError(
                f"The prompt has {len(ids) + num_cut} tokens, more than the model's "
                f"{layout.max_text_len}; shorten it."
            )
        return ids

    def _documents(
        self, given: Sequence[Document], count: int, query: dict[str, Any]
    ) -> tuple[Found, list[sequences.Example]]:
        """What to read before the prompt: best first to report, best last to read."""
        most, chosen = self.generator.layout.max_docs, list(given)
        if not 0 <= count <= most or len(given) > most:
            raise UserError(f"This model reads 0 to {most} documents, not {len(given) or count}.")
        scores: list[float | None] = [None] * len(given)
        if not given and count:
            chosen, scores = self._retrieve(query, count)
        found = [
            {
                "id": document.id,
                "score": score,
                "text": document.text,
                "url": document.url,
                "license": document.license,
            }
            for document, score in zip(chosen, scores, strict=False)
        ]
        return found, [self._example(document) for document in chosen][::-1]

    def _retrieve(
        self, query: dict[str, Any], count: int
    ) -> tuple[list[Document], list[float | None]]:
        """By the policy that training saw; documents without a picture are passed over."""
        counts = None
        if "text" in query:
            parts, counts = policy.split_queries([query["text"]], self.split_phrases)
            query = {"text": parts}
        found = policy.find_neighbors(
            self.memory.index("mixed").search,
            self.memory.encode(**query),
            self.memory.embeddings("mixed"),
            num_neighbors=4 * count,
            max_similarity=self.max_similarity,
            own_rows=np.array([-1]),
            own_keys=np.array([policy.NO_KEY]),
            row_keys=np.full(len(self.memory), policy.NO_KEY),
            counts=counts,
        )
        present = found.ids[0] >= 0
        documents = [self.memory.document(int(row)) for row in found.ids[0][present]]
        pairs = zip(documents, found.scores[0][present].tolist(), strict=True)
        with_picture = [pair for pair in pairs if pair[0].image is not None][:count]
        return [document for document, _ in with_picture], [score for _, score in with_picture]

    def _example(self, document: Document) -> sequences.Example:
        if document.image is None:
            raise UserError(f"Document {document.id!r} has no picture, which the model needs.")
        codes = self.image_tokenizer.encode(
            image_files.fit(document.image, self.image_tokenizer.image_size)[None]
        )[0]
        corpus = coded_corpus.Corpus(self.generator.layout, self.image_tokenizer)
        return corpus.example(document.text, codes)

    def _hole(self, band: tuple[int, int]) -> tuple[int, int]:
        side = round(self.generator.layout.num_codes**0.5)
        height = self.image_tokenizer.image_size // side
        start, end = band
        if (
            not 0 <= start < end <= self.image_tokenizer.image_size
            or start % height
            or end % height
        ):
            raise UserError(
                f"The rows {start}:{end} are no band of a picture of {self.image_tokenizer.image_size} rows; "
                f"give multiples of {height}, the first below the second."
            )
        return start // height * side, end // height * side


def load(workdir: epath.PathLike) -> Session:
    """Loads the decoder, tokenizer, retriever and memory of a finished run.

    Raises:
        UserError: there is no run, or a stage is missing, unfinished or edited.
    """
    run = run_folder.open_run(workdir)
    compilation_cache.keep_programs(run.workdir)
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, "decoder", image_tokenizer)
    encoder = train_retriever.load_encoder(run.workdir)
    # Not `finished_stage`: documents may be added to a run's memory by hand, which it checks itself.
    memory = Memory.open(run.stage_dir("memory"), encoder)
    rules = files.read_json(run.finished_stage("neighbors") / find_neighbors.POLICY)
    split_phrases = rules.get("split_phrases", False)  # Older runs do not tell.
    return Session(
        generator, image_tokenizer, encoder, memory, rules["max_similarity"], split_phrases
    )


def _sampling(temperature: float, top_p: float) -> Sampling:
    if not math.isfinite(temperature):
        raise UserError(f"temperature is {temperature}; give a finite number, at least 0.")
    try:
        return Sampling(temperature, top_p)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}; give at least 1.")
