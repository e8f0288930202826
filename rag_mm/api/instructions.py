"""What a decoder tuned on instructions does for a user: edit, answer, draw from boxes or a structure.

Its prompts are those of its training (CM3Leon, Table 5; docs/papers/cm3leon.md), with a user's words in the
first wording of a task.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.api.loaded_run import (
    GeneratedAnswers,
    GeneratedImages,
    LoadedRun,
    check_count,
    sampling_of,
)
from rag_mm.core import caption_text, image_files
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_items, named_boxes, token_documents
from rag_mm.data.instruction_items import ANSWER, CodedItem
from rag_mm.data.instruction_templates import TEMPLATES
from rag_mm.data.named_boxes import NamedBox
from rag_mm.decode import guidance as guidances
from rag_mm.decode import instruction_answers, tasks
from rag_mm.decode.guidance import Guidance
from rag_mm.stages.cm3leon import tuned_tasks

SILHOUETTE = "silhouette"
_PLAIN_DOCS, _INSTRUCTED_DOCS = (
    2,
    1,
)  # Retrieved, unless a number is given; the latter as in tuning.


class DrawingRequest(NamedTuple):
    """The arguments of `Session.generate` that say what is to be seen."""

    prompt: str
    boxes: Sequence[NamedBox] = ()
    structure: image_files.AnyImage | None = None
    feature: str = SILHOUETTE
    image_size: int | None = None


class ReadRequest(NamedTuple):
    """What the decoder reads of a request.

    Attributes:
        text: ids of the text before the image.
        given: the pictures that come before it, after retrieved documents.
        query: what documents are found by, and candidates ranked by.
        num_docs: how many documents to retrieve unless told.
    """

    text: list[int]
    given: tuple[token_documents.Example, ...]
    query: str
    num_docs: int


class Instructed(LoadedRun):
    """The instructions that a loaded run carries out; see `Session`."""

    def edit(
        self,
        image: image_files.AnyImage,
        prompt: str,
        *,
        second: image_files.AnyImage | None = None,
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.4,
        top_p: float = 1.0,
        guidance: float = 1.0,
        image_guidance: float = 1.0,
        plausible: float = 0.0,
    ) -> GeneratedImages:
        """Edits an image as a prompt says.

        With l_0 the logits without any prompt, l_image those given the pictures and l_full those given the
        prompt too, codes are sampled from (InstructPix2Pix's guidance by two conditions; CM3Leon, section 4)

            l_0 + image_guidance (l_image - l_0) + guidance (l_full - l_image)

        Example:
            run.edit(image, "change the background to red", num=4).images  # uint8 [4, H, W, 3]
            run.edit(image, "replace the apple", second=other, image_guidance=1.5).images[0]

        Args:
            image: of any size and form that `image_files.to_pixels` takes; scaled and center-cropped to the
                model's size.
            prompt: what to change; not empty, at most `generator.layout.max_text_len` tokens.
            second: another image, from which something is taken.
            num: number of images, at least 1.
            seed: the same seed gives the same images.
            temperature: softmax temperature, at least 0; 0 is greedy.
            top_p: nucleus sampling, in (0, 1].
            guidance: weight of the prompt, at least 0; 1 is plain sampling.
            image_guidance: weight of the images, at least 0; 1 is plain sampling.
            plausible: keeps only codes of at least this share of the largest probability, in [0, 1].

        Returns:
            The images, uint8 [num, H, W, 3]; no documents are read.

        Raises:
            UserError: an argument is out of range, the prompt is empty or too long, or the decoder was not
                tuned on edits of so many images.
        """
        sampling = sampling_of(temperature, top_p)
        check_count("num", num)
        pictures = [image_files.to_pixels(each) for each in (image, second) if each is not None]
        what = "edits of one picture" if second is None else "edits with a second picture"
        (task, *_) = tuned_tasks.known(self.tuned_on, tuned_tasks.edits(len(pictures)), what)
        text = self._text(caption_text.clean(prompt))
        corpus = self._corpus()
        given = [
            corpus.example(marked, self._codes(pixels)[0])
            for marked, pixels in zip(TEMPLATES[task][0].given, pictures, strict=True)
        ]
        sampled = tasks.generate_codes(
            self.generator,
            [text] * num,
            [given] * num,
            tasks.make_seeds(seed, num),
            sampling,
            steering=_two_conditions(guidance, image_guidance, plausible),
        )
        return GeneratedImages(self.image_tokenizer.decode(sampled.codes), [])

    def ask(
        self,
        image: image_files.AnyImage,
        question: str,
        *,
        docs: int = _INSTRUCTED_DOCS,
        documents: Sequence[Document] = (),
        num: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> GeneratedAnswers:
        """Answers a question about an image.

        Example:
            run.ask(image, "what is at the top left?").answers[0]

        Args:
            image: as of `edit`.
            question: not empty; leaves room for an answer among `generator.layout.max_text_len` tokens.
            docs: number of documents to retrieve by the image, 0 to `generator.layout.max_docs`.
            documents: read these, best first, instead of retrieving.
            num: number of answers; sample several with a temperature above 0.
            seed, temperature, top_p: as of `edit`; greedy by default.

        Returns:
            `num` answers, those of the highest mean log-probability per token first, these means in nats, and
            the documents read.

        Raises:
            UserError: an argument is out of range, the question is empty or too long, a document has no
                image, or the decoder was not tuned on questions.
        """
        sampling = sampling_of(temperature, top_p)
        check_count("num", num)
        (task, *_) = tuned_tasks.known(self.tuned_on, tuned_tasks.QUESTIONS, "questions")
        question = caption_text.clean(question)
        if not question:
            raise UserError("The question is empty; give one.")
        pixels = image_files.to_pixels(image)
        codes = self._codes(pixels)
        retrieved, examples = self._documents(documents, docs, {"image": pixels}, codes)
        # The answer is masked, so that any word will do.
        item = CodedItem(task, {"question": question, ANSWER: "a"}, codes[0])
        asked = instruction_items.instruct(
            self.generator.vocabulary,
            TEMPLATES[task][0],
            item,
            self.generator.layout.max_text_len,
            examples,
        )
        if asked.main.num_cut:
            raise UserError(
                f"The question is {asked.main.num_cut} tokens too long for this model, whose texts have at "
                f"most {self.generator.layout.max_text_len}; shorten it."
            )
        seeds = tasks.make_seeds(seed, num)
        answers, means = instruction_answers.generate_answers(
            self.generator, [asked] * num, seeds, sampling
        )
        order = np.argsort(-means, kind="stable")
        return GeneratedAnswers([answers[i] for i in order], means[order].tolist(), retrieved)

    def _read(self, request: DrawingRequest) -> ReadRequest:
        """A request in the wording of its task; raises UserError as `Session.generate` does."""
        if request.boxes and request.structure is not None:
            raise UserError("There are boxes and a structure; give one of them.")
        if request.boxes:
            return self._read_boxes(request)
        text = self._text(request.prompt)
        if request.structure is None:
            return ReadRequest(text, (), request.prompt, _PLAIN_DOCS)
        given = self._read_structure(request)
        return ReadRequest(text, (given,), request.prompt, _INSTRUCTED_DOCS)

    def _read_boxes(self, request: DrawingRequest) -> ReadRequest:
        tuned = tuned_tasks.known(self.tuned_on, tuned_tasks.BOXES, "boxes")
        size = request.image_size or self.image_tokenizer.image_size
        boxes = named_boxes.check(request.boxes, size)
        told, prompt = named_boxes.tell(boxes), request.prompt
        # The task of scenes says what is where and then what is behind it; captions of photos come first.
        parts = (told, prompt) if tuned[0] == tuned_tasks.BOXES[0] else (prompt, told)
        query = " ".join(filter(None, (named_boxes.tell_names(boxes), prompt)))
        text = self._text(" ".join(filter(None, parts)), "The prompt with its boxes")
        return ReadRequest(text, (), query, _INSTRUCTED_DOCS)

    def _read_structure(self, request: DrawingRequest) -> token_documents.Example:
        tuned = tuned_tasks.known(self.tuned_on, tuned_tasks.STRUCTURES, "structures")
        feature = caption_text.clean(request.feature)
        # A task is of the feature that its wording names, or of any.
        wordings = {
            instruction_items.fill(TEMPLATES[task][0].given[0], {"feature": feature})
            for task in tuned
        }
        if not feature or feature not in wordings:
            raise UserError(
                f"feature is {request.feature!r}, but this decoder was tuned on "
                f"{' and '.join(sorted(wordings))}; give one of those."
            )
        size = request.image_size or self.image_tokenizer.image_size
        assert request.structure is not None
        pixels = image_files.to_pixels(request.structure)
        if pixels.shape[:2] != (size, size):
            height, width = pixels.shape[:2]
            raise UserError(
                f"The structure has {width} x {height} pixels, but the image has {size} x {size}; give one "
                "of that size."
            )
        codes = self.image_tokenizer.encode(pixels[None])[0]
        text = self._corpus().example(feature, codes).text
        return token_documents.pair(text, codes, request.image_size)


def _two_conditions(text: float, image: float, plausible: float) -> Guidance | None:
    """The guidance of an edit; None where it is plain sampling."""
    guidances.check_number("image guidance", image, 0, guidances.LARGEST)
    if image != 1:
        return Guidance(text, documents_weight=image, plausible=plausible)
    # Without the stream of no prompt, whose weight is 0.
    guided = Guidance(text, guidances.DOCUMENTS, plausible=plausible)
    return None if text == 1 and not plausible else guided
