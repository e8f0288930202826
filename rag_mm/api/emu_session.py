"""What `rag_mm.load` returns for a finished run of Emu: texts and images' codes after any mix of both."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.api import emu_chat
from rag_mm.api.loaded_run import (
    GeneratedAnswers,
    GeneratedCaptions,
    GeneratedImages,
    RetrievedDocuments,
)
from rag_mm.core import caption_text, compilation_cache, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Mark, Part, Parts
from rag_mm.decode import decode_batch
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import rices
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.emu import saved_emu, saved_visual, tuned_emu
from rag_mm.stages.shared import build_memory, frozen, train_retriever, train_tokenizer

Prompt = Sequence[str | image_files.AnyImage | Document | Mark]
BEAMS = 5  # As in the paper's evaluation.
TUNED_STAGE = "emu_sft"


@dataclasses.dataclass(frozen=True, eq=False)
class EmuSession:
    """The loaded model, tower and memory of a finished run; `rag_mm.load` makes one.

    Example:
        run = rag_mm.load("runs/emu")
        run.caption(image, docs=2).captions[0]
        run.complete([first, "a red apple", second])  # in context: the text of the second image
        codes = run.imagine(["red apple at the top left on a blue background"])  # float32 [N, R]
        run.rank(codes, images)[0]  # the image that is nearest to it
        run.generate("red apple at the top left on a blue background", docs=1).images  # drawn

    Attributes:
        emu: the model and its sequences.
        encoder: the retriever, whose image tower is the frozen one.
        memory: the retrieval memory; None if the run has none.
        visual_decoder: draws images from codes; None if the run has trained none.
        tuned: the model that answers questions; None if the run was not tuned on instructions.
    """

    emu: saved_emu.LoadedEmu
    encoder: frozen.FrozenRetriever
    memory: Memory | None = None
    visual_decoder: saved_visual.LoadedVisualDecoder | None = None
    tuned: tuned_emu.TunedEmu | None = None

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
        retrieved, chosen = self.find_documents({"image": pixels[0]}, docs, documents)
        prompt: Prompt = [*chosen, *pixels]
        texts = self.write(prompt, num, seed, temperature, top_p, num_tokens, images_first=True)
        parts, vectors = self.read(prompt, images_first=True)
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
        parts, vectors = self.read(prompt, images_first)
        if temperature == 0:
            return self.emu.search(parts, vectors, num_tokens, max(BEAMS, num))[:num]
        try:
            sampling = Sampling(temperature, top_p)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        return self.emu.write([parts] * num, vectors, num_tokens, sampling, seed)

    def generate(
        self,
        prompt: str | Prompt,
        *,
        docs: int = 0,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
    ) -> GeneratedImages:
        """Draws the image that follows a prompt.

        Args:
            prompt: a caption; or, for an image in context, texts, images and documents in any order.
            docs: number of documents of the memory to put before it, those nearest to its texts, the nearest
                last.
            documents: put these before it instead, best first.
            num: number of images; they have the same codes and differ by their noise.
            seed: of the noise.
            guidance: moves away from the empty prompt's image; 1 does not, None is the decoder's own weight.
            steps: of the sampler; None for the decoder's own number.

        Returns:
            The images, uint8 [num, H, W, 3], and the documents read.

        Raises:
            UserError: the run has no visual decoder, an argument is out of range, there is no memory to
                retrieve from, or the prompt is too long.
        """
        decoder = self.visual_decoder
        if decoder is None:
            raise UserError(
                "This run draws no images: it has no finished stage visual_decoder; train one, as "
                "configs/emu.py:visual does."
            )
        if num < 1:
            raise UserError(f"num is {num}; give at least 1.")
        parts: Prompt = [prompt] if isinstance(prompt, str) else prompt
        text = caption_text.clean(" ".join(part for part in parts if isinstance(part, str)))
        if docs and not documents and not text:
            raise UserError("A prompt without a text retrieves nothing; give docs=0 or documents.")
        retrieved, chosen = self.find_documents({"text": text}, docs, documents)
        codes = self.imagine([*chosen, *parts])
        drawn = decoder.draw(np.repeat(codes[None], num, axis=0), seed, guidance, steps)
        return GeneratedImages(drawn, retrieved)

    def blend(self, images: Sequence[image_files.AnyImage], **options: Any) -> GeneratedImages:
        """Draws what follows two or more images without a text; `options` are those of `generate`.

        Raises:
            UserError: as `generate`, or there is one image only.
        """
        given = _images(images)
        if len(given) < 2:
            raise UserError(f"{len(given)} image cannot be blended; give two or more.")
        return self.generate(given, **options)

    def ask(
        self,
        image: image_files.AnyImage | Sequence[image_files.AnyImage],
        question: str,
        **options: Any,
    ) -> GeneratedAnswers:
        """Answers a question about an image, or about several together, by the model tuned on instructions.

        Args:
            image: as of `caption`.
            question: not empty.
            options: docs (1 by default, retrieved by the first image), documents, num, seed, temperature,
                top_p and num_tokens, as of `caption`.

        Returns:
            The answers as `caption` returns captions, and the documents read.

        Raises:
            UserError: the run was not tuned, the question is empty, or as of `caption`.
        """
        return emu_chat.ask(self, _images(image), question, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The assistant's next message in a dialogue.

        Example:
            first = {"role": "user", "content": [image, "what is at the top left?"]}
            run.chat([first, {"role": "assistant", "content": "red apple"},
                      {"role": "user", "content": "which color is the background?"}])

        Args:
            messages: {"role", "content"} of user and assistant in turn, the user's first and last; one of the
                system may come before. A content is a text, or for the user an image or a list of texts and
                images. If all is too long for the model, the oldest turns are left out, but not their images.
            options: docs (0 by default, retrieved by the first image), documents, seed, temperature, top_p
                and num_tokens, as of `caption`.

        Raises:
            UserError: the run was not tuned, a role is unknown or out of turn, a message is empty, or as of
                `caption`.
        """
        return emu_chat.chat(self, messages, **options)

    def imagine(self, prompt: Prompt, *, images_first: bool = False) -> np.ndarray:
        """The codes float32 [N, R] of the image that follows a prompt as of `write`."""
        parts, vectors = self.read(prompt, images_first)
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
        return self._retrieve({"image": image_files.to_pixels(image)}, docs)[0]

    def read(self, prompt: Prompt, images_first: bool) -> tuple[Parts, np.ndarray]:
        """The prompt, its images by their place, and their vectors [P, N, D]; raises as `write` does."""
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
            elif isinstance(item, Mark):
                parts.append(item)
            elif isinstance(item, Document):
                own = interleaved.parts_of(item, number)
                parts += interleaved.images_first(own) if images_first else own
            else:
                parts.append(number(0, item))
        if not pictures:
            width = self.emu.config.decoder.embed_dim
            return tuple(parts), np.zeros((0, self.emu.config.num_slots, width), np.float32)
        return tuple(parts), self.emu.vectors(self.codes(pictures))

    def find_documents(
        self, query: dict[str, Any], docs: int, given: Sequence[Document]
    ) -> tuple[RetrievedDocuments, list[Document]]:
        """The documents as they are reported, best first, and in the order of the prompt, best last."""
        if docs < 0:
            raise UserError(f"docs is {docs}; give 0 for no documents, or more.")
        chosen, scores = list(given)[::-1], [None] * len(given)
        if not given and docs:
            chosen, scores = self._retrieve(query, docs)
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

    def _retrieve(self, query: dict[str, Any], docs: int) -> tuple[list[Document], list[Any]]:
        """The documents nearest to `image` or `text`, the nearest last, and their scores."""
        memory = self.memory
        if memory is None:
            raise UserError("This run has no memory; give docs=0.")
        search = memory.index("image" if "image" in query else "mixed").search
        found = rices.select_examples(search, memory.encode(**query), docs)
        kept = [pair for pair in zip(found.ids[0], found.scores[0], strict=True) if pair[0] >= 0]
        return [memory.document(int(row)) for row, _ in kept], [float(score) for _, score in kept]


def _images(
    given: image_files.AnyImage | Sequence[image_files.AnyImage],
) -> list[image_files.AnyImage]:
    """One image, several, or the frames of a clip, as a list.

    Raises:
        UserError: there are more than a clip has.
    """
    if isinstance(given, np.ndarray):
        images = [given] if given.ndim < 4 else list(given)
    else:
        images = list(given) if isinstance(given, Sequence) else [given]
    if len(images) > interleaved.NUM_FRAMES:
        raise UserError(
            f"There are {len(images)} images; give at most {interleaved.NUM_FRAMES}, of a clip such as those "
            "of data.interleaved.frame_numbers."
        )
    return images


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
    visual_decoder, trained = None, run.manifest("visual_decoder")
    if trained is not None and trained.is_done:
        visual_decoder = saved_visual.load(run.finished_stage("visual_decoder"))
    tuned, adapted = None, run.manifest(TUNED_STAGE)
    if adapted is not None and adapted.is_done:
        tuned = tuned_emu.load(run.finished_stage(TUNED_STAGE), emu)
    return EmuSession(emu, encoder, memory, visual_decoder, tuned)
