"""What `rag_mm.load` returns for a finished run of Emu: texts and images' codes after any mix of both."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.api.session import GeneratedCaptions, RetrievedDocuments
from rag_mm.core import caption_text, compilation_cache, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Part, Parts
from rag_mm.decode import decode_batch
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import rices
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.emu import saved_emu
from rag_mm.stages.shared import build_memory, frozen, train_retriever, train_tokenizer

Prompt = Sequence[str | image_files.AnyImage | Document]
BEAMS = 5  # As in the paper's evaluation.


@dataclasses.dataclass(frozen=True, eq=False)
class EmuSession:
    """The loaded model, tower and memory of a finished run; `rag_mm.load` makes one.

    Example:
        run = rag_mm.load("runs/emu")
        run.caption(image, docs=2).captions[0]
        run.complete([first, "a red apple", second])  # in context: the text of the second image
        codes = run.imagine(["red apple at the top left on a blue background"])  # float32 [N, R]
        run.rank(codes, images)[0]  # the image that is nearest to it

    Attributes:
        emu: the model and its sequences.
        encoder: the retriever, whose image tower is the frozen one.
        memory: the retrieval memory; None if the run has none.
    """

    emu: saved_emu.LoadedEmu
    encoder: frozen.FrozenRetriever
    memory: Memory | None = None

    def caption(
        self,
        image: image_files.AnyImage | Sequence[image_files.AnyImage],
        *,
        docs: int = 0,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_tokens: int = 32,
    ) -> GeneratedCaptions:
        """Captions an image, or several together such as the frames of a clip in order of time.

        Args:
            image: of any size and form that `image_files.to_pixels` takes; one, a list of them, or the frames
                of a clip as uint8 [F, H, W, 3].
            docs: number of documents of the memory to put before it, those with the nearest images, the
                nearest last (RICES).
            documents: put these before it instead, best first.
            num: number of captions.
            seed: the same seed gives the same captions.
            temperature: softmax temperature; at 0 the captions are the best `num` of a beam search.
            top_p: nucleus sampling, in (0, 1].
            num_tokens: longest caption in tokens.

        Returns:
            The captions, those of the highest mean log-probability per token first, these means in nats, and
            the documents read.

        Raises:
            UserError: an argument is out of range, there is no memory to retrieve from, or the prompt is too
                long.
        """
        images = _images(image)
        if not images:
            raise UserError("There is no image to caption; give at least one.")
        pixels = [image_files.to_pixels(each) for each in images]
        retrieved, chosen = self._documents(pixels[0], docs, documents)
        prompt: Prompt = [*chosen, *pixels]
        texts = self.write(prompt, num, seed, temperature, top_p, num_tokens, images_first=True)
        parts, vectors = self._parts(prompt, images_first=True)
        answers: list[Parts] = [(text,) for text in texts]
        means = -self.emu.text_nll([parts] * num, answers, vectors)
        order = np.argsort(-means, kind="stable")
        return GeneratedCaptions([texts[i] for i in order], means[order].tolist(), retrieved)

    def complete(self, prompt: Prompt, **options: Any) -> str:
        """The text that follows a prompt; `options` are those of `write`."""
        return self.write(prompt, **options)[0]

    def write(
        self,
        prompt: Prompt,
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_tokens: int = 32,
        images_first: bool = False,
    ) -> list[str]:
        """`num` texts that follow a prompt.

        Args:
            prompt: texts, images and documents in any order; a video is 8 of its frames.
            num, seed, temperature, top_p, num_tokens: as of `caption`.
            images_first: whether a document's images come before its texts.

        Raises:
            UserError: as `caption`.
        """
        for name, value in (("num", num), ("num_tokens", num_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; give at least 1.")
        parts, vectors = self._parts(prompt, images_first)
        if temperature == 0:
            return self.emu.search(parts, vectors, num_tokens, max(BEAMS, num))[:num]
        try:
            sampling = Sampling(temperature, top_p)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        return self.emu.write([parts] * num, vectors, num_tokens, sampling, seed)

    def imagine(self, prompt: Prompt, *, images_first: bool = False) -> np.ndarray:
        """The codes float32 [N, R] of the image that follows a prompt as of `write`."""
        parts, vectors = self._parts(prompt, images_first)
        return self.emu.roll_out([parts], vectors)[0]

    def codes(self, images: Sequence[image_files.AnyImage]) -> np.ndarray:
        """The codes float32 [B, N, R] of images of any size."""
        pixels = [
            image_files.fit(image_files.to_pixels(each), self.encoder.image_size) for each in images
        ]
        stacked = np.stack(pixels)
        own_tower = self.emu.config.has_tower
        return self.emu.codes(stacked if own_tower else self.encoder.encode_image_tokens(stacked))

    def rank(self, codes: np.ndarray, images: Sequence[image_files.AnyImage]) -> list[int]:
        """The places of images in the order of their distance to codes [N, R], the nearest first."""
        distances = np.square(self.codes(images) - codes).mean((1, 2))
        return np.argsort(distances, kind="stable").tolist()

    def retrieve(self, image: image_files.AnyImage, docs: int) -> list[Document]:
        """The memory's documents with the nearest images, the nearest last (RICES).

        Raises:
            UserError: the run has no memory.
        """
        return self._retrieve(image_files.to_pixels(image), docs)[0]

    def _parts(self, prompt: Prompt, images_first: bool) -> tuple[Parts, np.ndarray]:
        """The prompt, its images by their place, and their vectors [P, N, D]."""
        if isinstance(prompt, str):
            raise UserError("A prompt is a list of texts and images; put the text into a list.")
        pictures: list[np.ndarray] = []

        def number(_: int, pixels: image_files.AnyImage) -> int:
            pictures.append(image_files.to_pixels(pixels))
            return len(pictures) - 1

        parts: list[Part] = []
        for item in prompt:
            if isinstance(item, str):
                parts.append(caption_text.clean(item))
            elif isinstance(item, Document):
                own = interleaved.parts_of(item, number)
                parts += interleaved.images_first(own) if images_first else own
            else:
                parts.append(number(0, item))
        if not pictures:
            width = self.emu.config.decoder.embed_dim
            return tuple(parts), np.zeros((0, self.emu.config.num_slots, width), np.float32)
        return tuple(parts), self.emu.vectors(self.codes(pictures))

    def _documents(
        self, image: np.ndarray, docs: int, given: Sequence[Document]
    ) -> tuple[RetrievedDocuments, list[Document]]:
        """The documents as they are reported, best first, and in the order of the prompt, best last."""
        if docs < 0:
            raise UserError(f"docs is {docs}; give 0 for no documents, or more.")
        chosen, scores = list(given)[::-1], [None] * len(given)
        if not given and docs:
            chosen, scores = self._retrieve(image, docs)
        retrieved = [
            {
                "id": document.id,
                "score": score,
                "text": document.text,
                "url": document.url,
                "license": document.license,
            }
            for document, score in zip(chosen, scores, strict=True)
        ]
        return retrieved[::-1], chosen

    def _retrieve(self, image: np.ndarray, docs: int) -> tuple[list[Document], list[Any]]:
        memory = self.memory
        if memory is None:
            raise UserError("This run has no memory; caption with docs=0.")
        query = memory.encode(image=image)
        found = rices.select_examples(memory.index("image").search, query, docs)
        kept = [pair for pair in zip(found.ids[0], found.scores[0], strict=True) if pair[0] >= 0]
        return [memory.document(int(row)) for row, _ in kept], [float(score) for _, score in kept]


def _images(
    given: image_files.AnyImage | Sequence[image_files.AnyImage],
) -> list[image_files.AnyImage]:
    """One image, several, or the frames of a clip, as a list."""
    if isinstance(given, np.ndarray):
        return [given] if given.ndim < 4 else list(given)
    return list(given) if isinstance(given, Sequence) else [given]


def is_emu(workdir: epath.PathLike) -> bool:
    """Whether a run has a model of the stage `emu`, and none of `decoder`."""
    run = run_folder.Run(epath.Path(workdir))
    return run.manifest("emu") is not None and run.manifest("decoder") is None


def load(workdir: epath.PathLike, mesh: Sequence[int] | None = None) -> EmuSession:
    """Loads the model, retriever and memory of a finished run.

    Args:
        workdir: the run folder.
        mesh: of the model, see `decode_batch.make_mesh`.

    Raises:
        UserError: a stage is missing, unfinished or edited, or the mesh does not fit.
    """
    on_mesh = decode_batch.make_mesh(mesh)
    run = run_folder.open_run(workdir)
    compilation_cache.keep_programs()
    emu = saved_emu.load(run.finished_stage("emu"), on_mesh)
    encoder = train_retriever.load_encoder(run.workdir)
    memory = None
    if run.manifest("memory") is not None:
        tokenizer = train_tokenizer.load_tokenizer(run.workdir)
        memory = build_memory.open_newest(run, encoder, tokenizer)
    return EmuSession(emu, encoder, memory)
