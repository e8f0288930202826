"""Frozen encoders as folders that stand alone: a config, a vocabulary, parameters.

A stage leaves one as its result and a memory carries copies of them, so that neither needs the run that
trained them. The fingerprint is that of the folder's content, wherever it lies.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from rag_mm.convert import table, weights
from rag_mm.core import digests, files
from rag_mm.core.errors import UserError
from rag_mm.data import public_text, vocabulary
from rag_mm.models import clip
from rag_mm.models.spae import autoencoder
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.train import checkpoint

Words = vocabulary.Vocabulary | public_text.PublicTokenizer
CONFIG, VOCABULARY, PARAMS = "config.json", "vocabulary.json", "params.safetensors"


@dataclasses.dataclass(frozen=True)
class Mounted:
    """A model's structure and its parameters."""

    graphdef: nnx.GraphDef
    params: Params

    def compile(self, method: str) -> Callable[..., jax.Array]:
        """One method as a compiled function of arrays."""

        @jax.jit
        def call(params: Params, *arrays: jax.Array) -> Any:
            return getattr(nnx.merge(self.graphdef, params), method)(*arrays)

        return functools.partial(call, self.params)


class FrozenRetriever:
    """A frozen CLIP and its text tokenizer: what a memory embeds and searches with."""

    def __init__(self, folder: epath.PathLike):
        """Loads what `save_retriever` or an import wrote.

        Raises:
            UserError: the folder is missing, incomplete or another family's.
        """
        self.folder = folder = epath.Path(folder)
        config = _read_config(folder, "clip")
        towers = {side: clip.TowerConfig(**config[side]) for side in ("vision", "text")}
        self.config = clip.CLIPConfig(**{k: _tuples(v) for k, v in config.items()} | towers)
        self.vocabulary = _load_words(folder)
        self.fingerprint = fingerprint(folder)
        self.dim, self.image_size = self.config.projection_dim, self.config.image_size
        model = _mount(folder, functools.partial(_make_clip, self.config))
        self._encode_image = model.compile("encode_image")
        self._encode_text = model.compile("encode_text")

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Unit rows, float32 [B, D], of uint8 [B, image_size, image_size, 3]."""
        return in_batches(lambda batch: self._encode_image(image_ops.to_float(batch)), pixels)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Unit rows, float32 [B, D]; a longer text than the tower's is cut.

        Raises:
            UserError: this CLIP was imported without its tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.folder} has no tokenizer, so it takes no text: import it from a folder with "
                f"{public_text.TOKENIZER}, or {public_text.VOCABULARY} and {public_text.MERGES}."
            )
        return in_batches(self._encode_text, text_tokens(self.config, self.vocabulary, texts))


class FrozenTokenizer:
    """A frozen image tokenizer and the vocabulary that shares its ids."""

    def __init__(self, folder: epath.PathLike):
        """Loads what `save_tokenizer` wrote; raises as `Retriever`."""
        folder = epath.Path(folder)
        self.config = autoencoder.SPAEConfig(
            **{k: _tuples(v) for k, v in _read_config(folder, "spae").items()}
        )
        self.vocabulary = vocabulary.load_vocabulary(folder / VOCABULARY)
        self.fingerprint = fingerprint(folder)
        self.image_size = self.config.image_size
        model = _mount(folder, functools.partial(_make_spae, self.config))
        self._encode, self._decode = model.compile("encode"), model.compile("decode")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes, int32 [B, N], of uint8 [B, image_size, image_size, 3]."""
        return in_batches(lambda batch: self._encode(image_ops.to_float(batch)), pixels)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pictures, uint8 [B, image_size, image_size, 3], of codes int32 [B, N]."""
        return in_batches(lambda batch: image_ops.to_uint8(self._decode(batch)), codes)


def save_retriever(
    folder: epath.Path, config: clip.CLIPConfig, words: vocabulary.Vocabulary, params: Params
) -> None:
    """Writes a folder that `Retriever` loads."""
    _save(folder, {"family": "clip", **dataclasses.asdict(config)}, words, params)


def save_tokenizer(
    folder: epath.Path, config: autoencoder.SPAEConfig, words: vocabulary.Vocabulary, params: Params
) -> None:
    """Writes a folder that `Tokenizer` loads."""
    _save(folder, {"family": "spae", **dataclasses.asdict(config)}, words, params)


def load_params(folder: epath.Path, make_model: Callable[[], nnx.Module]) -> Mounted:
    """A model from parameters that a checkpoint keeps, on one device.

    Raises:
        UserError: nothing is there, or it is another model.
    """
    graphdef, abstract = param_trees.describe(make_model, None)
    return Mounted(graphdef, checkpoint.load_params(folder, abstract))


def fingerprint(folder: epath.Path) -> str:
    """Hash of a folder's content."""
    return files.digest(files.canonical_json(digests.folder_digests(folder)).encode())


def text_tokens(config: clip.CLIPConfig, words: Words, texts: list[str]) -> np.ndarray:
    """Rows of token ids closed and filled up by end-of-text: int32 [B, max_text_len]."""
    tokens = np.full((len(texts), config.max_text_len), config.end_of_text, np.int32)
    for row, text in enumerate(texts):
        ids = words.encode_text(text)[: config.max_text_len - 1]
        tokens[row, : len(ids)] = ids
    return tokens


def in_batches(
    call: Callable[[np.ndarray], jax.Array], rows: np.ndarray, batch_size: int = 256
) -> np.ndarray:
    """`call` on pieces of one size (the last one padded) so that it compiles once; one whole array."""
    found = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (rows.ndim - 1)
        found.append(np.asarray(call(np.pad(batch, padding)))[: len(batch)])
    return np.concatenate(found)


def _make_clip(config: clip.CLIPConfig) -> clip.CLIP:
    return clip.CLIP(config, rngs=nnx.Rngs(0))


def _make_spae(config: autoencoder.SPAEConfig) -> autoencoder.SPAE:
    return autoencoder.SPAE(config, rngs=nnx.Rngs(0))


def _save(
    folder: epath.Path, config: Mapping[str, Any], words: vocabulary.Vocabulary, params: Params
) -> None:
    files.write_atomic(
        folder / PARAMS, safetensors.numpy.save(table.leaves_by_path(jax.device_get(params)))
    )
    words.save(folder / VOCABULARY)
    files.write_json(folder / CONFIG, config)


def _mount(folder: epath.Path, make_model: Callable[[], nnx.Module]) -> Mounted:
    """A model from the folder's own parameters; the same bits make the same file, unlike a checkpoint."""
    graphdef, abstract = param_trees.describe(make_model, None)
    # Imported weights may rest in fewer bits; an encoder computes in float32.
    params = weights.load_file(folder / PARAMS, abstract, np.dtype(np.float32))
    return Mounted(graphdef, params)


def _load_words(folder: epath.Path) -> Words | None:
    if (folder / VOCABULARY).exists():
        return vocabulary.load_vocabulary(folder / VOCABULARY)
    return public_text.load_tokenizer(folder)


def _read_config(folder: epath.Path, family: str) -> dict[str, Any]:
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.pop("family", None) != family:
        raise UserError(f"{folder} does not hold a model of the family {family}.")
    return config


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
