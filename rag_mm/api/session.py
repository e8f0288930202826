"""What `rag_mm.load` returns for a finished run: generate, caption and infill images, search its memory."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import caption_text, code_grids, compilation_cache, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.decode import decode_batch, reranking, tasks
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.ra_cm3 import decoder_record, train_decoder
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    find_neighbors,
    frozen,
    train_retriever,
    train_tokenizer,
)

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
class Session:
    """The loaded models and memory of a finished run; `rag_mm.load` makes one.

    Example:
        run = rag_mm.load("runs/quickstart")
        image = run.generate("red apple on a blue background", docs=2).images[0]  # uint8 [H, W, 3]
        text = run.caption(image).captions[0]
        hits = run.memory.search(text="red apple", k=5)

    Attributes:
        generator: the decoder, with its prompt layout and image-code vocabulary.
        image_tokenizer: images to codes and back.
        encoder: the retriever, images and texts to unit vectors.
        memory: the retrieval memory; see `rag_mm.memory.retrieval_memory.Memory`.
        rules: which documents retrieval skips as redundant, and whether it splits captions into phrases.
    """

    generator: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    memory: Memory
    rules: policy.Rules = dataclasses.field(default_factory=policy.Rules)

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
        image_size: int | None = None,
        guidance: Guidance | None = None,
        contrast: Contrast | None = None,
        decoding: str = tasks.SEQUENTIAL,
    ) -> GeneratedImages:
        """Generates images from a caption.

        Example:
            run.generate("red apple at the top left", docs=2, num=4, seed=1).images  # uint8 [4, H, W, 3]
            run.generate("red apple", temperature=1.0, guidance=Guidance(1.5, plausible=0.1)).images[0]

        Args:
            prompt: the caption; not empty, at most `generator.layout.max_text_len` tokens.
            docs: number of documents to retrieve, 0 to `generator.layout.max_docs`; 0 turns retrieval off.
            documents: condition on these documents, best first, instead of retrieving. Each needs an image.
            num: number of images, at least 1.
            seed: the same seed gives the same images.
            temperature: softmax temperature, at least 0; 0 is greedy.
            top_p: nucleus sampling, in (0, 1]; keeps the likeliest tokens up to this total probability.
            best_of: number of candidates per image; the one whose retriever embedding is closest to the
                caption's is kept.
            image_size: height and width in pixels, of a model trained on several sizes; None: its default.
            guidance: moves away from a null prompt (`decode.guidance`); None: none. Without documents the
                null prompt `caption` is the prompt itself, which changes nothing, and `documents` is `bare`.
            contrast: `decode.contrastive_decoding`; None: none. With guidance, half of the
                `best_of` candidates are made by each.
            decoding: sequential, code by code; or jacobi, many codes a pass with the same distribution.

        Returns:
            The images, uint8 [num, H, W, 3], the documents read, and the candidates if there are several.

        Raises:
            UserError: an argument is out of range, the caption is empty or too long, a document has no image,
                training never showed the model a null prompt, or one candidate is to be made by both guidance
                and contrast.
        """
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        _check_count("best_of", best_of)
        if guidance and contrast and best_of == 1:
            raise UserError(
                "guidance and contrast make half of the candidates each, but best_of is 1; give 2 or more."
            )
        prompt = caption_text.clean(prompt)
        text = self._text(prompt)
        retrieved, examples = self._documents(documents, docs, {"text": prompt})
        grids = None
        if image_size is not None:
            grids = self.image_tokenizer.grids_at(image_size, image_size)

        def draw(seeds: np.ndarray, steering: tasks.Steering | None) -> np.ndarray:
            sampled = tasks.generate_codes(
                self.generator,
                [text] * num,
                [examples] * num,
                seeds,
                sampling,
                image_size=image_size,
                steering=steering,
                decoding=decoding,
            )
            return self.image_tokenizer.decode(sampled.codes, grids=grids)

        given: list[tasks.Steering] = [way for way in (guidance, contrast) if way is not None]
        ways: Sequence[tasks.Steering | None] = given or (None,)
        drawn = reranking.best_of(
            [partial(draw, steering=way) for way in ways],
            lambda images: self._similarity(prompt, images),
            num,
            best_of,
            seed,
        )
        if drawn.scores is None:
            return GeneratedImages(drawn.best, retrieved)
        return GeneratedImages(drawn.best, retrieved, drawn.items.swapaxes(0, 1), drawn.scores.T)

    def caption(
        self,
        image: image_files.AnyImage,
        *,
        docs: int = 2,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> GeneratedCaptions:
        """Captions an image.

        Example:
            run.caption(image, docs=0).captions[0]

        Args:
            image: of any size and form that `image_files.to_pixels` takes; scaled and center-cropped to the
                model's size.
            docs, documents, seed, temperature, top_p: as for `generate`; greedy by default.
            num: number of captions; sample several with a temperature above 0.

        Returns:
            `num` captions, those of the highest mean log-probability per token first, these means in nats,
            and the documents read.

        Raises:
            UserError: an argument is out of range, or a document has no image.
        """
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        image = image_files.to_pixels(image)
        codes = self._codes(image)
        retrieved, examples = self._documents(documents, docs, {"image": image}, codes)
        captions, means = tasks.generate_captions(
            self.generator,
            np.repeat(codes, num, axis=0),
            [examples] * num,
            tasks.make_seeds(seed, num),
            sampling,
        )
        order = np.argsort(-means, kind="stable")
        return GeneratedCaptions([captions[i] for i in order], means[order].tolist(), retrieved)

    def infill(
        self,
        image: image_files.AnyImage,
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
        """Regenerates a horizontal band of an image, given what is above and below it.

        The band has the full width, because a masked span is a run of codes in raster order. A pyramid has
        one in each grid, so that training must have masked as many spans at once.

        Example:
            run.infill(image, "red apple on blue", band=(8, 24), num=4).images  # uint8 [4, H, W, 3]

        Args:
            image: of any size and form that `image_files.to_pixels` takes; scaled and center-cropped to the
                model's size.
            prompt: caption of the whole image.
            band: (first pixel row, last pixel row + 1) at the model's size; multiples of a code's height.
            docs, documents, num, seed, temperature, top_p: as for `generate`.

        Returns:
            The whole images, uint8 [num, H, W, 3], decoded from their codes, and the documents read.

        Raises:
            UserError: as for `generate`, or the band is not aligned to codes.
        """
        sampling = _sampling(temperature, top_p)
        _check_count("num", num)
        tokenizer = self.image_tokenizer
        holes = code_grids.ranges_of_rows(tokenizer.grids, tokenizer.image_size, *band)
        image, prompt = image_files.to_pixels(image), caption_text.clean(prompt)
        main = token_documents.pair(self._text(prompt), self._codes(image)[0])
        retrieved, examples = self._documents(documents, docs, {"text": prompt})
        sampled = tasks.infill_codes(
            self.generator,
            [main] * num,
            holes,
            [examples] * num,
            tasks.make_seeds(seed, num),
            sampling,
        )
        return GeneratedImages(self.image_tokenizer.decode(sampled.codes), retrieved)

    def _similarity(self, prompt: str, images: np.ndarray) -> np.ndarray:
        """Cosine similarity of a caption to images uint8 [N, H, W, 3], float32 [N], by the retriever."""
        fitted = [image_files.fit(image, self.encoder.image_size) for image in images]
        embeddings = self.encoder.encode_image(np.stack(fitted))
        return (embeddings * self.encoder.encode_text([prompt])).sum(axis=1)

    def _text(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise UserError("The prompt is empty; give a caption.")
        layout = self.generator.layout
        ids, num_cut = token_documents.encode_text(
            self.image_tokenizer.vocabulary, prompt, layout.max_text_len
        )
        if num_cut:
            raise UserError(
                f"The prompt has {len(ids) + num_cut} tokens, but the model takes at most "
                f"{layout.max_text_len}; shorten it."
            )
        return ids

    def _documents(
        self,
        given: Sequence[Document],
        count: int,
        query: dict[str, Any],
        query_codes: np.ndarray | None = None,
    ) -> tuple[RetrievedDocuments, list[token_documents.Example]]:
        """The documents to condition on: best first for the report, best last for the model."""
        max_docs, documents = self.generator.layout.max_docs, list(given)
        if not 0 <= count <= max_docs or len(given) > max_docs:
            raise UserError(
                f"This model reads 0 to {max_docs} documents, not {len(given) or count}."
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
        corpus = coded_corpus.Corpus(self.generator.layout, self.image_tokenizer)
        return corpus.example(caption_text.clean(document.text), self._codes(document.image)[0])

    def _codes(self, image: np.ndarray) -> np.ndarray:
        """Codes int32 [1, N] of an image uint8 [H, W, 3] of any size."""
        pixels = image_files.fit(image, self.image_tokenizer.image_size)
        return self.image_tokenizer.encode(pixels[None])


def load(
    workdir: epath.PathLike,
    mesh: Sequence[int] | None = None,
    stage: str = decoder_record.STAGE,
) -> Session:
    """Loads the decoder, image tokenizer, retriever and memory of a finished run; see `rag_mm.load`.

    Args:
        workdir: the run folder.
        mesh: of the decoder, see `decode_batch.make_mesh`; the other models are on one device.
        stage: the stage that trained the decoder, such as `sft` for the one tuned on instructions.

    Raises:
        UserError: there is no run in `workdir`, or one of its stages is missing, unfinished or edited;
            `stage` trained no decoder; or the mesh has too many devices, or does not split the decoder.
    """
    on_mesh = decode_batch.make_mesh(mesh)
    run = run_folder.open_run(workdir)
    compilation_cache.keep_programs()
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, stage, image_tokenizer, on_mesh)
    encoder = train_retriever.load_encoder(run.workdir)
    memory = build_memory.open_newest(run, encoder, image_tokenizer)
    rules = find_neighbors.load_policy(run)
    return Session(generator, image_tokenizer, encoder, memory, rules)


def _sampling(temperature: float, top_p: float) -> Sampling:
    if not math.isfinite(temperature):
        raise UserError(f"temperature is {temperature}; give a finite number of at least 0.")
    try:
        return Sampling(temperature, top_p)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}; give at least 1.")
