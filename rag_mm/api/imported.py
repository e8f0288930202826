"""Imported runs in the hand: `rag_mm.load` of a CLIP, a LLaMA or a Chameleon."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.api import importing, language_model
from rag_mm.convert import table, weights
from rag_mm.core import compilation_cache, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import preprocess, public_text
from rag_mm.models import chameleon
from rag_mm.nn.decoder import Decoder
from rag_mm.ops import images as image_ops
from rag_mm.stages.shared import frozen


@dataclasses.dataclass(frozen=True, eq=False)
class DualEncoder:
    """A CLIP: pictures and texts to unit vectors that can be compared."""

    retriever: frozen.FrozenRetriever

    def encode_image(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Unit rows, float32 [B, D], of uint8 [H, W, 3] of any size, prepared as CLIP was trained."""
        size = self.retriever.image_size
        fitted = [preprocess.scale_and_crop(p, size, "bicubic") for p in pictures]
        return self.retriever.encode_image(np.stack(fitted))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows, float32 [B, D]; raises UserError where it was imported without a tokenizer."""
        return self.retriever.encode_text(list(texts))


@dataclasses.dataclass(frozen=True, eq=False)
class Chameleon(language_model.LanguageModel):
    """A Chameleon: prompts of texts and pictures, continued in text."""

    model: chameleon.ChameleonConfig
    vq: frozen.Mounted

    def encode_image(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Tokens int32 [B, N] of uint8 [H, W, 3] of any size, prepared as Chameleon was trained."""
        size = self.model.vq.image_size
        fitted = np.stack([preprocess.scale_and_crop(p, size, "lanczos") for p in pictures])
        encode = self.vq.compile("encode")
        codes = frozen.in_batches(lambda batch: encode(image_ops.to_float(batch)), fitted, 8)
        return np.asarray(self.model.code_tokens, np.int32)[codes]

    def prompt(self, parts: Sequence[str | np.ndarray]) -> list[int]:
        """Ids of a prompt that mixes texts and pictures uint8 [H, W, 3].

        Raises:
            UserError: there is no tokenizer, or it has no token for a picture.
        """
        text, placeholder = language_model.need_text(self.text), "<image>"
        place = text.tokenizer.token_to_id(placeholder)
        begin, end = "<racm3:break>", "<eoss>"
        if None in (place, text.tokenizer.token_to_id(begin), text.tokenizer.token_to_id(end)):
            raise UserError(f"The tokenizer lacks {placeholder}, {begin} or {end}.")
        image = begin + placeholder * self.model.vq.num_codes + end
        joined = "".join(part if isinstance(part, str) else image for part in parts)
        ids = np.asarray(text.encode_text(joined))
        pictures = [part for part in parts if not isinstance(part, str)]
        if (ids == place).sum() != self.model.vq.num_codes * len(pictures):
            raise UserError(
                f"A text of the prompt holds {placeholder}, which stands for a picture."
            )
        if pictures:
            ids[ids == place] = self.encode_image(pictures).ravel()
        return ids.tolist()

    def generate(
        self,
        prompts: Any,
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> language_model.Completions:
        """As `LanguageModel.generate`; a prompt may be what `prompt` gives. Only text is written."""
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        allowed = np.ones(self.config.vocab_size, bool)
        allowed[list(self.model.code_tokens)] = False
        ids = [self._ids(prompt) for prompt in several]
        return self._go_on(ids, allowed, num_tokens, temperature, top_p, seed)

    def draw(
        self, prompt: Sequence[int], *, temperature: float = 1.0, top_p: float = 0.9, seed: int = 0
    ) -> np.ndarray:
        """Tokens int32 [N] of one picture after a prompt; `decode_image` makes pixels of them."""
        allowed = np.zeros(self.config.vocab_size, bool)
        allowed[list(self.model.code_tokens)] = True
        unending = dataclasses.replace(self, ends=())
        count = self.model.vq.num_codes
        drawn = unending._go_on([list(prompt)], allowed, count, temperature, top_p, seed)
        return np.asarray(drawn.tokens[0], np.int32)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] of image tokens int32 [B, N].

        Raises:
            UserError: the checkpoint has no decoder of pictures (the public ones have none).
        """
        if not self.model.vq.has_decoder:
            raise UserError(
                "This Chameleon was imported without the decoder of its image tokenizer, so it cannot "
                "make pixels; its tokens are right."
            )
        try:
            codes = chameleon.codes_of(self.model.code_tokens, tokens)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        return np.asarray(image_ops.to_uint8(self.vq.compile("decode")(codes)))


Imported = DualEncoder | language_model.LanguageModel


def is_imported(workdir: epath.PathLike) -> bool:
    """Whether a folder is a run that an import made."""
    path = epath.Path(workdir) / "config.json"
    return path.exists() and importing.IMPORTED in files.read_json(path)


def load(workdir: epath.PathLike, dtype: str | None = None) -> Imported:
    """Loads an imported run.

    Args:
        workdir: the run.
        dtype: of a language model's weights and activations; None takes the stored one.

    Raises:
        UserError: there is no such run, or its stage is unfinished or edited.
    """
    run = run_folder.open_run(workdir)
    family = importing.find_family(str(run.config.get(importing.IMPORTED)))
    compilation_cache.keep_programs(run.workdir)
    stage_dir = run.finished_stage(importing.STAGES[family.name])
    folder = stage_dir / importing.FOLDER
    if family.name == "clip":
        return DualEncoder(frozen.FrozenRetriever(folder))
    config = importing.load_config(family, folder)
    wanted = importing.find_dtype(dtype)
    params = weights.load_file(folder / frozen.PARAMS, family.describe(config)[1], wanted)
    first = table.named(params)[_embedding_path(config)].dtype
    shape = dataclasses.replace(importing.decoder_config(config), dtype=first.name)
    decoder = params["decoder"] if isinstance(config, chameleon.ChameleonConfig) else params
    graphdef, _ = nnx.split(jax.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0))), nnx.Param)
    text = public_text.load_text(folder)
    ends = _read_ends(stage_dir / importing.SOURCE)
    if not isinstance(config, chameleon.ChameleonConfig):
        return language_model.LanguageModel(shape, graphdef, decoder, text, ends)
    vq_graphdef, _ = nnx.split(jax.eval_shape(functools.partial(_make_vq, config)), nnx.Param)
    vq = frozen.Mounted(vq_graphdef, jax.tree.map(_to_float32, params["vq"]))
    return Chameleon(shape, graphdef, decoder, text, ends, config, vq)


def _read_ends(folder: epath.Path) -> tuple[int, ...]:
    # Generation settings, where there are any, know ends that the config does not (of turns).
    for name in ("generation_config.json", "config.json"):
        values = files.read_json(folder / name) if (folder / name).exists() else {}
        found = values.get("eos_token_id") if isinstance(values, dict) else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _embedding_path(config: Any) -> str:
    return ("decoder/" if isinstance(config, chameleon.ChameleonConfig) else "") + "embedding/table"


def _make_vq(config: chameleon.ChameleonConfig) -> nnx.Module:
    return chameleon.Chameleon(config, rngs=nnx.Rngs(0)).vq


def _to_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32)
