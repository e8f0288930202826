"""What `rag_mm.load` returns for a finished run: generate, caption and infill images, search its memory."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from etils import epath

from rag_mm.api.instructions import SILHOUETTE, DrawingRequest, Instructed
from rag_mm.api.loaded_run import (
    GeneratedCaptions,
    GeneratedImages,
    check_count,
    sampling_of,
)
from rag_mm.core import caption_text, code_grids, compilation_cache, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.data.named_boxes import NamedBox
from rag_mm.decode import decode_batch, reranking, tasks
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance
from rag_mm.stages.cm3leon import tuned_tasks
from rag_mm.stages.ra_cm3 import decoder_record, train_decoder
from rag_mm.stages.shared import build_memory, find_neighbors, train_retriever, train_tokenizer


class Session(Instructed):
    """The loaded models and memory of a finished run; `rag_mm.load` makes one.

    Its attributes are those of `LoadedRun`, and beside the methods here it has `edit` and `ask` of
    `Instructed`.

    Example:
        run = rag_mm.load("runs/quickstart")
        image = run.generate("red apple on a blue background", docs=2).images[0]  # uint8 [H, W, 3]
        text = run.caption(image).captions[0]
        hits = run.memory.search(text="red apple", k=5)
        tuned = rag_mm.load("runs/sft", stage="sft")
        tuned.edit(image, "change the background to green").images[0]
    """

    def generate(
        self,
        prompt: str,
        *,
        boxes: Sequence[NamedBox] = (),
        structure: image_files.AnyImage | None = None,
        feature: str = SILHOUETTE,
        docs: int | None = None,
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
            tuned.generate("on a red background", boxes=[("apple", (8, 0, 32, 24))]).images[0]
            tuned.generate("apple on a red background", structure=edges, feature="edges").images[0]

        Args:
            prompt: the caption; not empty, at most `generator.layout.max_text_len` tokens. With boxes it is
                what they leave out, and may be empty.
            boxes: what is to be where, `NamedBox`es or such pairs; takes a decoder tuned on that.
            structure: a silhouette, edges or another feature map, of the height and width of the image, in
                which things are to be; takes a decoder tuned on that. Not with boxes.
            feature: which map that is, such as silhouette or edges.
            docs: number of documents to retrieve, 0 to `generator.layout.max_docs`, of which a structure
                takes one; 0 turns retrieval off. None: 1 with boxes or a structure, as in tuning, else 2.
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
                training never showed the model a null prompt, one candidate is to be made by both guidance
                and contrast, the decoder was not tuned on boxes or structures, a box is outside of the image,
                or the structure is of another size.
        """
        sampling = sampling_of(temperature, top_p)
        check_count("num", num)
        check_count("best_of", best_of)
        if guidance and contrast and best_of == 1:
            raise UserError(
                "guidance and contrast make half of the candidates each, but best_of is 1; give 2 or more."
            )
        request = DrawingRequest(caption_text.clean(prompt), boxes, structure, feature, image_size)
        asked = self._read(request)
        count = asked.num_docs if docs is None else docs
        retrieved, examples = self._documents(
            documents, count, {"text": asked.query}, num_pictures=len(asked.given)
        )
        grids = None
        if image_size is not None:
            grids = self.image_tokenizer.grids_at(image_size, image_size)

        def draw(seeds: np.ndarray, steering: tasks.Steering | None) -> np.ndarray:
            sampled = tasks.generate_codes(
                self.generator,
                [asked.text] * num,
                [[*examples, *asked.given]] * num,
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
            lambda images: self._similarity(asked.query, images),
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
        sampling = sampling_of(temperature, top_p)
        check_count("num", num)
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
        sampling = sampling_of(temperature, top_p)
        check_count("num", num)
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
    rules = find_neighbors.load_policy(run, stage)
    tuned_on = tuned_tasks.read(run, stage)
    return Session(generator, image_tokenizer, encoder, memory, rules, tuned_on)
