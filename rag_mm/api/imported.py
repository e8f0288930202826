"""What `rag_mm.load` returns of `rag-mm import`: CLIP, SigLIP 2, LLaMA, Chameleon, Emu or image tokenizer."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.api import imported_emu, importing
from rag_mm.convert import weights
from rag_mm.core import compilation_cache, files, image_files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import preprocess, public_text
from rag_mm.decode import decode_batch
from rag_mm.frozen_lm import language_model
from rag_mm.frozen_lm.lm_protocol import Completions
from rag_mm.models import chameleon, siglip2, vqgan
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import Decoder
from rag_mm.ops import images as image_ops
from rag_mm.stages.shared import frozen, train_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class DualEncoder:
    """An imported CLIP or SigLIP 2: images and texts to unit vectors of one embedding space.

    Example:
        clip = rag_mm.load("runs/clip")
        clip.encode_image([image]) @ clip.encode_text(["a red apple"]).T  # cosine similarity [1, 1]
    """

    retriever: frozen.FrozenRetriever

    def encode_image(self, images: Sequence[image_files.AnyImage]) -> np.ndarray:
        """Unit vectors, float32 [B, D], of images of any size, preprocessed as the public model does.

        For CLIP the shorter side is scaled and the center cropped; for SigLIP 2 the whole image becomes a
        square or, of a NaFlex model, whole patches in about its own aspect.

        An image is one that `image_files.to_pixels` takes; like transformers, it drops an alpha channel.
        """
        config = self.retriever.config
        if not isinstance(config, siglip2.SigLIP2Config):
            return self.retriever.encode_image(_fit(images, config.image_size, "bicubic"))
        found = np.zeros((len(images), self.retriever.dim), np.float32)
        by_size: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for place, image in enumerate(images):
            scaled = _whole_patches(image, config)
            by_size.setdefault(scaled.shape, []).append((place, scaled))
        for same in by_size.values():
            places, scaled_images = zip(*same, strict=True)
            found[list(places)] = self.retriever.encode_grid(np.stack(scaled_images))
        return found

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [B, D], of B texts.

        Raises:
            UserError: the checkpoint was imported without a tokenizer.
        """
        return self.retriever.encode_text(list(texts))

    def match(self, images: Sequence[image_files.AnyImage], texts: Sequence[str]) -> np.ndarray:
        """The probability, float32 [B, C], that each image and each text match, by a SigLIP 2's sigmoid.

        Raises:
            UserError: this is a CLIP, which only compares texts with each other; or as `encode_text`.
        """
        if not isinstance(self.retriever.config, siglip2.SigLIP2Config):
            raise UserError(
                "A CLIP has no probability of a match; compare `encode_image` and `encode_text`."
            )
        match = self.retriever.model.compile("match")
        return np.asarray(match(self.encode_image(images), self.encode_text(texts)))


@dataclasses.dataclass(frozen=True, eq=False)
class ImportedChameleon(language_model.LanguageModel):
    """An imported Chameleon: completes prompts of text and images with text or image tokens.

    Example:
        model = rag_mm.load("runs/chameleon")
        prompt = model.prompt([image, "What is in the image?"])
        model.generate([prompt], num_tokens=32).texts[0]

    Attributes:
        model: the sizes of decoder and image tokenizer, and the token id of each image code.
        vq: the image tokenizer.
        pictures: decodes images in place of `vq`; see `with_pictures`.
    """

    text: public_text.PublicTokenizer | None
    model: chameleon.ChameleonConfig
    vq: frozen.LoadedModel
    pictures: frozen.FrozenTokenizer | None = None

    def with_pictures(self, decoder: frozen.FrozenTokenizer) -> "ImportedChameleon":
        """This model with an imported image tokenizer whose decoder draws this model's codes.

        Code k must mean the same to both, which holds if the decoder was trained with this model's codebook.
        Only sizes can be checked here.

        Example:
            model = rag_mm.load("runs/chameleon").with_pictures(rag_mm.load("runs/chameleon_vq"))
            model.decode_image(model.generate_image(prompt)[None])

        Raises:
            UserError: it has no decoder, or its codebook or grid has another size.
        """
        ours, theirs = self.model.vq, decoder.config
        if not isinstance(theirs, vqgan.VQGANConfig) or not theirs.has_decoder:
            raise UserError(f"{decoder.folder} is not an imported image tokenizer with a decoder.")
        for name in ("codebook_size", "embed_dim", "num_codes"):
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"The {name} of {decoder.folder} is {getattr(theirs, name):,}, but this model's is "
                    f"{getattr(ours, name):,}, so it cannot draw this model's codes."
                )
        return dataclasses.replace(self, pictures=decoder)

    def encode_image(self, images: Sequence[image_files.AnyImage]) -> np.ndarray:
        """Image tokens, int32 [B, N], of images of any size (`DualEncoder.encode_image`), for Chameleon."""
        size = self.model.vq.image_size
        codes = frozen.in_batches(
            lambda batch: self._encode(image_ops.to_float(batch)),
            _fit(images, size, "lanczos"),
            image_ops.num_at_once(size),
        )
        return np.asarray(self.model.code_tokens, np.int32)[codes]

    def prompt(self, parts: Sequence[str | image_files.AnyImage]) -> list[int]:
        """Token ids of a prompt that mixes texts and images (`encode_image`).

        Raises:
            UserError: there is no tokenizer, it lacks the image placeholder, or a text contains it.
        """
        text, placeholder = language_model.need_text(self.text), "<image>"
        placeholder_id = text.tokenizer.token_to_id(placeholder)
        begin, end = "<racm3:break>", "<eoss>"
        if None in (
            placeholder_id,
            text.tokenizer.token_to_id(begin),
            text.tokenizer.token_to_id(end),
        ):
            raise UserError(f"The tokenizer has no token {placeholder}, {begin} or {end}.")
        image_text = begin + placeholder * self.model.vq.num_codes + end
        joined = "".join(part if isinstance(part, str) else image_text for part in parts)
        ids = np.asarray(text.encode_text(joined))
        images = [part for part in parts if not isinstance(part, str)]
        if (ids == placeholder_id).sum() != self.model.vq.num_codes * len(images):
            raise UserError(
                f"A text of the prompt contains {placeholder}, the placeholder for an image."
            )
        if images:
            ids[ids == placeholder_id] = self.encode_image(images).ravel()
        return ids.tolist()

    def generate(
        self,
        prompts: Any,
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Completions:
        """As `LanguageModel.generate`; prompts may come from `prompt`. Image tokens are never sampled."""
        allowed = np.ones(self.config.vocab_size, bool)
        allowed[list(self.model.code_tokens)] = False
        ids = self._ids_of(prompts)
        return self._complete(ids, allowed, num_tokens, temperature, top_p, seed)

    def generate_image(
        self, prompt: Sequence[int], *, temperature: float = 1.0, top_p: float = 0.9, seed: int = 0
    ) -> np.ndarray:
        """Samples the image tokens, int32 [N], of one image after a prompt; see `decode_image`.

        Args:
            prompt: token ids, such as from `prompt`.
            temperature, top_p, seed: as for `generate`.

        Raises:
            UserError: the prompt and the image's N tokens exceed the maximum sequence length.
        """
        allowed = np.zeros(self.config.vocab_size, bool)
        allowed[list(self.model.code_tokens)] = True
        without_stop = dataclasses.replace(self, stop_tokens=())
        count = self.model.vq.num_codes
        sampled = without_stop._complete([list(prompt)], allowed, count, temperature, top_p, seed)
        return np.asarray(sampled.tokens[0], np.int32)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Images, uint8 [B, S, S, 3], of image tokens int32 [B, N].

        Raises:
            UserError: a token is not an image token, or the checkpoint lacks the image tokenizer's decoder
                (the public ones do).
        """
        if not self.model.vq.has_decoder and self.pictures is None:
            raise UserError(
                "This Chameleon was imported without the decoder of its image tokenizer, so its image "
                "tokens cannot be decoded to pixels; add one by `with_pictures`."
            )
        try:
            codes = chameleon.tokens_to_codes(self.model.code_tokens, tokens)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        if self.pictures is not None:
            return self.pictures.decode(codes)
        return frozen.in_batches(
            lambda batch: image_ops.to_uint8(self._decode(batch)),
            codes,
            image_ops.num_at_once(self.model.vq.image_size),
        )

    @functools.cached_property
    def _encode(self) -> Callable[..., jax.Array]:
        return self.vq.compile("encode")

    @functools.cached_property
    def _decode(self) -> Callable[..., jax.Array]:
        return self.vq.compile("decode")


_LANGUAGE = ("llama", "chameleon", "emu", "cm3")
ImportedModel = (
    DualEncoder | language_model.LanguageModel | frozen.FrozenTokenizer | imported_emu.ImportedEmu
)


def is_imported(workdir: epath.PathLike, family: str | None = None) -> bool:
    """Whether a folder is a run made by `rag-mm import`; with a family, one of this family."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return False
    found = files.read_object(path).get(importing.IMPORTED)
    return found is not None and family in (None, found)


def load(
    workdir: epath.PathLike, dtype: str | None = None, mesh: Sequence[int] | None = None
) -> ImportedModel:
    """Loads an imported run.

    Args:
        workdir: the run folder.
        dtype: dtype of a language model's weights and activations; None keeps the stored one.
        mesh: of a language model's decoder, see `decode_batch.make_mesh`; None: one device.

    Returns:
        `DualEncoder` for CLIP and SigLIP 2, `LanguageModel` for LLaMA, `ImportedChameleon` for Chameleon,
        `imported_emu.ImportedEmu` for Emu, `frozen.FrozenTokenizer` for an image tokenizer.

    Raises:
        UserError: there is no imported run in `workdir`, or it is unfinished or was edited; or `dtype` is
            unknown, or given for another model; or the mesh has too many devices, does not split the model,
            or is given for another one.
    """
    run = run_folder.open_run(workdir)
    weights_dtype = importing.find_dtype(dtype)
    on_mesh = decode_batch.make_mesh(mesh)
    for name, value in (("dtype", dtype), ("mesh", mesh)):
        if value is not None and run.config.get(importing.IMPORTED) not in _LANGUAGE:
            raise UserError(f"{name}={value!r} is for language models; load {workdir} without it.")
    if run.config.get(importing.IMPORTED) == importing.IMAGE_TOKENIZER:
        compilation_cache.keep_programs()
        return train_tokenizer.load_tokenizer(workdir)
    family = importing.find_family(str(run.config.get(importing.IMPORTED)))
    compilation_cache.keep_programs()
    stage_dir = run.finished_stage(importing.STAGES[family.name])
    folder = stage_dir / importing.FOLDER
    if family.name in frozen.RETRIEVERS:
        return DualEncoder(frozen.FrozenRetriever(folder))
    config = importing.load_config(family, folder)
    abstract = family.describe(config, on_mesh)[1]
    param_trees.check_split(abstract, "Give another mesh")
    params = weights.load_file(folder / frozen.PARAMS, abstract, weights_dtype)
    if isinstance(config, EmuConfig):
        emu = imported_emu.load(config, params, public_text.load_tokenizer(folder))
        return imported_emu.with_painter(emu, pathlib.Path(folder))
    stored_dtype = param_trees.leaves_by_path(params)[_embedding_path(config)].dtype
    decoder_config = dataclasses.replace(importing.decoder_config(config), dtype=stored_dtype.name)
    decoder = params["decoder"] if isinstance(config, chameleon.ChameleonConfig) else params
    graphdef, _ = nnx.split(
        jax.eval_shape(lambda: Decoder(decoder_config, rngs=nnx.Rngs(0))), nnx.Param
    )
    text = public_text.load_tokenizer(folder)
    stop_tokens = importing.read_stop_tokens(stage_dir / importing.SOURCE)
    if not isinstance(config, chameleon.ChameleonConfig):
        return language_model.LanguageModel(decoder_config, graphdef, decoder, text, stop_tokens)
    vq_graphdef, _ = nnx.split(jax.eval_shape(functools.partial(_make_vq, config)), nnx.Param)
    on_one_device = jax.device_put(params["vq"], jax.local_devices()[0])
    vq = frozen.LoadedModel(vq_graphdef, jax.tree.map(_to_float32, on_one_device))
    return ImportedChameleon(decoder_config, graphdef, decoder, text, stop_tokens, config, vq)


def _fit(
    images: Sequence[image_files.AnyImage], size: int, resample: preprocess.Filter
) -> np.ndarray:
    """Images preprocessed as for a public checkpoint: uint8 [B, size, size, 3]."""
    pixels = (image_files.to_pixels(image, composite_on_white=False) for image in images)
    return np.stack([preprocess.scale_and_crop(each, size, resample) for each in pixels])


def _whole_patches(image: image_files.AnyImage, config: siglip2.SigLIP2Config) -> np.ndarray:
    """An image as a SigLIP 2 reads it: uint8, square or of whole patches."""
    pixels, size = image_files.to_pixels(image, composite_on_white=False), config.image_size
    filter_name: preprocess.Filter = "bilinear" if config.resample == "bilinear" else "bicubic"
    if not config.any_aspect:
        return preprocess.stretch(pixels, size, filter_name)
    height, width = pixels.shape[:2]
    sides = preprocess.size_of_patches(height, width, config.patch_size, config.grid**2)
    return preprocess.stretch(pixels, sides, filter_name)


def _embedding_path(config: Any) -> str:
    return ("decoder/" if isinstance(config, chameleon.ChameleonConfig) else "") + "embedding/table"


def _make_vq(config: chameleon.ChameleonConfig) -> nnx.Module:
    return chameleon.Chameleon(config, rngs=nnx.Rngs(0)).vq


def _to_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32)
