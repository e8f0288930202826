"""What `rag_mm.load` returns for an imported Emu: it reads texts, images and clips, and writes either."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from rag_mm.api import emu_painter
from rag_mm.convert import emu_format
from rag_mm.core import batches, image_files, image_slots
from rag_mm.core.errors import UserError
from rag_mm.data import emu_prompts, interleaved, preprocess, public_text
from rag_mm.decode import beam, decode_batch, image_rollout, sampler
from rag_mm.frozen_lm import language_model
from rag_mm.frozen_lm.lm_protocol import Completions
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.emu_model import Emu
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params

# A text, token ids, an image, or a clip: images in time order, or uint8 [F, H, W, 3].
Part = Any
_LENGTHS, _AT_ONCE = 32, 16
_CAPTION = f" {emu_prompts.CAPTION} [ASSISTANT]: {emu_prompts.CAPTION_STEM}"
_ANSWER = f" {emu_prompts.QUESTION} [ASSISTANT]: {emu_prompts.QUESTION_STEM}"


@dataclasses.dataclass(frozen=True, eq=False)
class EmuPrompt:
    """A sequence of ids with images, and the vectors float32 [images * N, D] of these."""

    row: image_slots.SlottedIds
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ImportedEmu:
    """An imported Emu: reads texts, images and clips, and writes text or the vectors of an image.

    Example:
        emu = rag_mm.load("runs/emu")
        emu.caption([image])[0]
        prompt = emu.prompt([dog, "There are two dogs.", panda, "There are three pandas.", sunflower])
        emu.complete([prompt], num_tokens=16).texts[0]
        emu.imagine([emu.prompt(["a photo of a cat"])])  # float32 [1, 32, 5120]

    Attributes:
        config: sizes.
        graphdef, params: structure and parameters of the whole model.
        text: the tokenizer, or None if the checkpoint has none.
        painter: the visual decoder, or None if the checkpoint has none.
    """

    config: EmuConfig
    graphdef: nnx.GraphDef
    params: Params
    text: public_text.PublicTokenizer | None
    painter: emu_painter.EmuPainter | None = None

    @property
    def is_instruct(self) -> bool:
        """Whether it is the instruct model, which follows instructions and writes no images."""
        return emu_format.is_instruct(self.config)

    def encode_image(self, images: Sequence[image_files.AnyImage]) -> np.ndarray:
        """Vectors, float32 [B, N, D], of images of any size, which are stretched to the tower's square."""
        size = self.config.vision.image_size
        pixels = [image_files.to_pixels(image, composite_on_white=False) for image in images]
        fitted = np.stack([preprocess.stretch(each, size, "bicubic") for each in pixels])
        found = [self._on_mesh(_encode, images=fitted[i]) for i in _parts(len(images))]
        return np.concatenate(found)[: len(images)]

    def prompt(self, parts: Sequence[Part]) -> EmuPrompt:
        """A prompt of any order: `<s>`, then texts, token ids, images and clips as they come.

        Raises:
            UserError: a clip has more than 8 frames, a text or the ids contain a special token of images, or
                there is a text but no tokenizer.
        """
        laid: list[list[int] | None] = []
        images: list[image_files.AnyImage] = []
        for part in parts:
            if isinstance(part, str):
                laid.append(self.text_ids(part))
            elif _is_ids(part):
                laid.append(self._checked(part))
            else:
                frames = _frames(part)
                images += frames
                laid += [None] * len(frames)
        n, width = self.config.num_slots, self.config.decoder.embed_dim
        row = image_slots.interleave(laid, self.config.ids, n)
        image_slots.check(row.tokens, row.slot, len(images), self.config.ids, n)
        vectors = self.encode_image(images) if images else np.zeros((0, n, width), np.float32)
        return EmuPrompt(row, vectors.reshape(-1, width))

    def complete(
        self,
        prompts: Sequence[EmuPrompt],
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        min_tokens: int = 0,
    ) -> Completions:
        """The texts that follow prompts, up to the end of the sequence.

        Args:
            prompts: from `prompt`.
            num_tokens: of a text at most, at least 1.
            temperature: at least 0; 0 is greedy.
            top_p: nucleus sampling, in (0, 1].
            seed: the same seed gives the same texts.
            num_beams: above 1: beam search (`decode.beam`), which needs temperature 0.
            length_penalty, min_tokens: of beam search.

        Raises:
            UserError: an argument is out of range, or a prompt is too long.
        """
        self._check(prompts, num_tokens)
        sampler.check_seed(seed)
        if num_beams < 1 or (num_beams > 1 and temperature):
            raise UserError(
                f"num_beams={num_beams} with temperature={temperature:g}: give at least 1 beam, and "
                "temperature=0 with several."
            )
        if 2 * num_beams > self._allowed.sum():
            raise UserError(
                f"num_beams={num_beams} are more than half of the vocabulary; give fewer."
            )
        try:
            sampling = sampler.Sampling(temperature, top_p)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        seeds = np.arange(len(prompts), dtype=np.uint32) + np.uint32(seed % 2**32)
        shared = dict(graphdef=self._decoder, num_steps=num_tokens, stop=self.config.ids.end)

        def write(rows: np.ndarray) -> np.ndarray:
            stacked, params = self._stack([prompts[row] for row in rows]), self.params["decoder"]
            if num_beams == 1:
                how = dict(shared, sampling=sampling)
                return sampler.sample(params, stacked, seeds[rows], self._allowed, **how).tokens
            how = dict(num_beams=num_beams, length_penalty=length_penalty, min_steps=min_tokens)
            found = beam.search(params, stacked, self._allowed, **shared, **how)
            return found.tokens[:, 0]

        tokens = np.concatenate([np.asarray(write(rows)) for rows in _parts(len(prompts))])
        return self._completions(prompts, tokens[: len(prompts)])

    def caption(
        self, images: Sequence[Part], *, num_tokens: int = 20, num_beams: int = 5, **how: Any
    ) -> list[str]:
        """A caption of each image or clip; beam search with a length penalty of -1, as the paper's.

        `how` are further arguments of `complete`.
        """
        end = [f"{emu_prompts.SYSTEM} [USER]: ", _CAPTION] if self.is_instruct else ["", ""]
        prompts = [self._around(end[0], image, end[1]) for image in images]
        how = dict(length_penalty=-1.0) | how
        return self._texts(prompts, num_tokens=num_tokens, num_beams=num_beams, **how)

    def answer(
        self,
        images: Sequence[Part],
        questions: Sequence[str],
        *,
        num_tokens: int = 20,
        num_beams: int = 5,
        **how: Any,
    ) -> list[str]:
        """The answer to a question about each image or clip; `how` as for `caption`.

        The base model continues the image and the question as they are: give a question that a text answers,
        such as `"Question: what is it? Answer:"`.
        """
        if len(images) != len(questions):
            raise UserError(
                f"There are {len(images)} images but {len(questions)} questions; give one for each."
            )
        pairs = zip(images, questions, strict=True)
        prompts = [
            self._around(f"{emu_prompts.SYSTEM} [USER]: ", image, _ANSWER.format(question))
            if self.is_instruct
            else self._around("", image, question)
            for image, question in pairs
        ]
        how = dict(length_penalty=-1.0) | how
        return self._texts(prompts, num_tokens=num_tokens, num_beams=num_beams, **how)

    def imagine(self, prompts: Sequence[EmuPrompt]) -> np.ndarray:
        """The vectors float32 [B, N, D] of the image that follows each prompt, which a visual decoder draws.

        Raises:
            UserError: this is the instruct model, or a prompt is too long.
        """
        if self.is_instruct:
            raise UserError(
                "This is Emu's instruct model, which does not write images; load the base model for that."
            )
        self._check(prompts, self.config.num_slots + 1)
        image = self.config.ids.image

        def start(prompt: EmuPrompt) -> EmuPrompt:
            row = prompt.row
            tokens, slot = np.append(row.tokens, image), np.append(row.slot, -1)
            longer = image_slots.SlottedIds(tokens.astype(np.int32), slot.astype(np.int32))
            return EmuPrompt(longer, prompt.vectors)

        roll_out = functools.partial(image_rollout.roll_out, graphdef=self.graphdef)
        found = [
            np.asarray(roll_out(self.params, self._stack([start(prompts[row]) for row in rows])))
            for rows in _parts(len(prompts))
        ]
        return np.concatenate(found)[: len(prompts)]

    def generate_image(
        self,
        prompts: Sequence[EmuPrompt],
        *,
        seed: int = 0,
        guidance: float | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """The image, uint8 [B, H, W, 3], that follows each prompt: of a text, of images and texts, or of two
        images alone, which blends them.

        Args:
            prompts: from `prompt`.
            seed, guidance, num_steps: see `emu_painter.EmuPainter.draw`.

        Raises:
            UserError: there is no visual decoder, an argument is out of range, or as `imagine`.
        """
        if self.painter is None:
            raise UserError(
                "This Emu was imported without a visual decoder; import it from a folder with unet and vae."
            )
        return self.painter.draw(self.imagine(prompts), seed, guidance, num_steps)

    def _around(self, before: str, image: Part, after: str) -> EmuPrompt:
        return self.prompt([part for part in (before, image, after) if not _is_empty(part)])

    def _texts(self, prompts: Sequence[EmuPrompt], **how: Any) -> list[str]:
        language_model.need_text(self.text)
        return [text.strip() for text in self.complete(prompts, **how).texts or ()]

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text; raises UserError if it holds a special token of images."""
        tokenizer, ids = language_model.need_text(self.text).tokenizer, self.config.ids
        found = tokenizer.encode(text, add_special_tokens=False).ids
        allowed = text.count(
            "[IMG]ImageContent[/IMG]"
        )  # Of the instruct model's own system message.
        given = sum(each in (ids.image, ids.end_image) for each in found)
        if given > 2 * allowed or ids.slot in found or ids.pad in found:
            raise UserError(
                f"The text {text[:40]!r} contains a special token such as [IMG]; give images as images."
            )
        return found

    def _checked(self, given: Sequence[int]) -> list[int]:
        """Token ids of a text."""
        ids, found = self.config.ids, [int(each) for each in given]
        ours = {ids.pad, ids.image, ids.end_image, ids.slot} & {*found}
        if ours or min(found, default=0) < 0 or max(found, default=0) >= len(self._allowed):
            wrong = min(ours, default=None)
            what = (
                "an id outside the vocabulary" if wrong is None else f"{wrong}, a token of images"
            )
            raise UserError(f"The token ids hold {what}; give ids of texts, and images as images.")
        return found

    def _check(self, prompts: Sequence[EmuPrompt], num_more: int) -> None:
        longest, most = (
            max((len(p.row.tokens) for p in prompts), default=0),
            self.config.decoder.max_seq_len,
        )
        if not prompts:
            raise UserError("There is no prompt; give at least one.")
        if num_more < 1 or longest + num_more > most:
            raise UserError(
                f"A prompt of {longest} tokens and {num_more} new ones exceed the model's maximum sequence "
                f"length of {most}."
            )

    def _stack(self, prompts: Sequence[EmuPrompt]) -> sampler.Prompts:
        longest = max(len(prompt.row.tokens) for prompt in prompts)
        length = longest + -longest % _LENGTHS
        rows, vectors = [p.row for p in prompts], [p.vectors for p in prompts]
        return image_rollout.stack_prompts(rows, vectors, length)

    def _completions(self, prompts: Sequence[EmuPrompt], tokens: np.ndarray) -> Completions:
        end = self.config.ids.end
        cut = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
        if self.text is None:
            return Completions(cut, None)
        decode = self.text.decode_continuation
        texts = [
            decode(prompt.row.tokens[prompt.row.slot < 0].tolist(), own)
            for prompt, own in zip(prompts, cut, strict=True)
        ]
        return Completions(cut, texts)

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        """Tokens of text: all but those of images, of which the model never learned to begin one."""
        ids, allowed = self.config.ids, np.ones(self.config.decoder.vocab_size, bool)
        allowed[[ids.pad, ids.image, ids.end_image, ids.slot]] = False
        return allowed

    @functools.cached_property
    def _decoder(self) -> nnx.GraphDef:
        return nnx.split(nnx.merge(self.graphdef, self.params).decoder)[0]

    def _on_mesh(self, call: Any, **batch: np.ndarray) -> np.ndarray:
        run = functools.partial(call, self.params, graphdef=self.graphdef)
        mesh = decode_batch.mesh_of(self.params)
        if mesh is None:
            return np.asarray(run(**batch))
        return np.asarray(decode_batch.run_on_mesh(mesh, run, batch))


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode(params: Params, images: jax.Array, graphdef: nnx.GraphDef) -> jax.Array:
    model: Emu = nnx.merge(graphdef, params)
    codes = model.encode(model.see(images.astype("float32") / 255))
    return codes.astype("float32")


def load(
    config: EmuConfig, params: Params, text: public_text.PublicTokenizer | None
) -> ImportedEmu:
    """The model with parameters of any dtype, in which it computes."""
    dtype = param_trees.leaves_by_path(params)["decoder/embedding/table"].dtype
    decoder = dataclasses.replace(config.decoder, dtype=dtype.name, remat="none")
    config = dataclasses.replace(config, decoder=decoder)
    make = lambda: Emu(config, rngs=nnx.Rngs(0))
    return ImportedEmu(config, nnx.split(jax.eval_shape(make), nnx.Param)[0], params, text)


def with_painter(emu: ImportedEmu, folder: pathlib.Path) -> ImportedEmu:
    """The model with the visual decoder of its folder, if there is one and the model writes images."""
    painter = None if emu.is_instruct else emu_painter.load(folder, emu.config)
    if painter is None:
        return emu
    null = emu.imagine([emu.prompt([])])[0]
    params = {**painter.params, "null": null.astype(np.float32)}
    return dataclasses.replace(emu, painter=dataclasses.replace(painter, params=params))


def _parts(count: int) -> list[np.ndarray]:
    return list(batches.split(count, _AT_ONCE))


def _is_ids(part: Part) -> bool:
    return isinstance(part, list | tuple) and all(isinstance(p, int | np.integer) for p in part)


def _is_empty(part: Part) -> bool:
    return isinstance(part, str) and not part


def _frames(part: Part) -> list[image_files.AnyImage]:
    """One image, or those of a clip."""
    is_clip = isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim == 4)
    frames = list(part) if is_clip else [part]
    if len(frames) > interleaved.NUM_FRAMES:
        raise UserError(
            f"A clip has {len(frames)} frames; give at most {interleaved.NUM_FRAMES}, such as those of "
            "data.interleaved.frame_numbers."
        )
    return frames
