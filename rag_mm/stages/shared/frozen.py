"""Frozen models as self-contained folders: config, vocabulary and parameters.

A stage writes such a folder as its result, and a memory contains copies, so that a memory works without the
run that trained the models. A model's fingerprint is the digest of the folder's content, not of its path.
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
from rag_mm.core import batches, digests, files, renames
from rag_mm.core.errors import UserError
from rag_mm.data import public_text, vocabulary
from rag_mm.models import clip
from rag_mm.models.spae import autoencoder
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.train import checkpoint

TextVocabulary = vocabulary.Vocabulary | public_text.PublicTokenizer
CONFIG, VOCABULARY, PARAMS = "config.json", "vocabulary.json", "params.safetensors"
TEXT_BATCH = 256  # Texts encoded at once.


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """The structure and the parameters of a model."""

    graphdef: nnx.GraphDef
    params: Params

    def compile(self, method: str) -> Callable[..., jax.Array]:
        """A method of the model as a compiled function of arrays."""

        @jax.jit
        def call(params: Params, *arrays: jax.Array) -> Any:
            return getattr(nnx.merge(self.graphdef, params), method)(*arrays)

        return functools.partial(call, self.params)


class FrozenRetriever:
    """A frozen CLIP with its text tokenizer; the encoder of a memory (`memory.model_protocols.Encoder`)."""

    def __init__(self, folder: epath.PathLike, image_batch: int | None = None):
        """Loads a folder that `save_retriever` or an import wrote.

        Args:
            folder: config, parameters and text tokenizer.
            image_batch: images encoded at once, at least 1; None for `ops.images.num_at_once`. More are
                faster on an accelerator and take more of its memory.

        Raises:
            UserError: the folder is missing or incomplete, or holds a model of another family.
        """
        self.folder = folder = epath.Path(folder)
        config = _read_config(folder, "clip")
        towers = {side: clip.TowerConfig(**config[side]) for side in ("vision", "text")}
        self.config = clip.CLIPConfig(**{k: _tuples(v) for k, v in config.items()} | towers)
        self.vocabulary = _load_vocabulary(folder)
        self.fingerprint = fingerprint(folder)
        self.dim, self.image_size = self.config.projection_dim, self.config.image_size
        self.image_batch = image_batch or image_ops.num_at_once(self.image_size)
        self.text_batch = TEXT_BATCH
        model = _load_model(folder, functools.partial(_make_clip, self.config))
        self._encode_image = model.compile("encode_image")
        self._encode_text = model.compile("encode_text")

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings float32 [B, D], of length 1, of images uint8 [B, image_size, image_size, 3]."""
        return in_batches(
            lambda batch: self._encode_image(image_ops.to_float(batch)), pixels, self.image_batch
        )

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Embeddings float32 [B, D], of length 1; texts longer than the tower's limit are truncated.

        Raises:
            UserError: this CLIP was imported without its tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.folder} has no tokenizer and cannot encode text; import it from a folder with "
                f"{public_text.TOKENIZER}, or {public_text.VOCABULARY} and {public_text.MERGES}."
            )
        tokens = text_tokens(self.config, self.vocabulary, texts)
        return in_batches(self._encode_text, tokens, self.text_batch)


class FrozenTokenizer:
    """A frozen image tokenizer and its vocabulary (`memory.model_protocols.ImageTokenizer`)."""

    def __init__(self, folder: epath.PathLike, image_batch: int | None = None):
        """Loads a folder that `save_tokenizer` wrote; arguments and errors as of `FrozenRetriever`."""
        folder = epath.Path(folder)
        self.config = autoencoder.SPAEConfig(
            **{k: _tuples(v) for k, v in _read_config(folder, "spae").items()}
        )
        self.vocabulary = vocabulary.load_vocabulary(folder / VOCABULARY)
        self.fingerprint = fingerprint(folder)
        self.image_size = self.config.image_size
        self.image_batch = image_batch or image_ops.num_at_once(self.image_size)
        model = _load_model(folder, functools.partial(_make_spae, self.config))
        self._encode, self._decode = model.compile("encode"), model.compile("decode")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int32 [B, N] of images uint8 [B, image_size, image_size, 3]."""
        return in_batches(
            lambda batch: self._encode(image_ops.to_float(batch)), pixels, self.image_batch
        )

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Images uint8 [B, image_size, image_size, 3] of codes int32 [B, N]."""
        return in_batches(
            lambda batch: image_ops.to_uint8(self._decode(batch)), codes, self.image_batch
        )


def save_retriever(
    folder: epath.Path,
    config: clip.CLIPConfig,
    text_vocabulary: vocabulary.Vocabulary,
    params: Params,
) -> None:
    """Writes a folder that `FrozenRetriever` loads."""
    _save(folder, {"family": "clip", **dataclasses.asdict(config)}, text_vocabulary, params)


def save_tokenizer(
    folder: epath.Path,
    config: autoencoder.SPAEConfig,
    text_vocabulary: vocabulary.Vocabulary,
    params: Params,
) -> None:
    """Writes a folder that `FrozenTokenizer` loads."""
    _save(folder, {"family": "spae", **dataclasses.asdict(config)}, text_vocabulary, params)


def load_params(folder: epath.Path, make_model: Callable[[], nnx.Module]) -> LoadedModel:
    """Loads a model from parameters that `checkpoint.save_params` wrote, on one device.

    Raises:
        UserError: there are no parameters, or they belong to another model.
    """
    graphdef, abstract = param_trees.describe(make_model, None)
    return LoadedModel(graphdef, checkpoint.load_params(folder, abstract))


def fingerprint(folder: epath.Path) -> str:
    """Digest of the content of a folder."""
    return files.digest(files.canonical_json(digests.folder_digests(folder)).encode())


def text_tokens(
    config: clip.CLIPConfig, vocabulary: TextVocabulary, texts: list[str]
) -> np.ndarray:
    """Token ids of texts, truncated and padded with end-of-text: int32 [B, max_text_len]."""
    tokens = np.full((len(texts), config.max_text_len), config.end_of_text, np.int32)
    for i, text in enumerate(texts):
        ids = vocabulary.encode_text(text)[: config.max_text_len - 1]
        tokens[i, : len(ids)] = ids
    return tokens


def in_batches(
    call: Callable[[np.ndarray], jax.Array], rows: np.ndarray, batch_size: int
) -> np.ndarray:
    """Applies `call` to at least one row, in full batches and a last one of a power of two of rows."""
    results = [np.asarray(call(rows[part])) for part in batches.split(len(rows), batch_size)]
    return np.concatenate(results)[: len(rows)]


def _make_clip(config: clip.CLIPConfig) -> clip.CLIP:
    return clip.CLIP(config, rngs=nnx.Rngs(0))


def _make_spae(config: autoencoder.SPAEConfig) -> autoencoder.SPAE:
    return autoencoder.SPAE(config, rngs=nnx.Rngs(0))


def _save(
    folder: epath.Path,
    config: Mapping[str, Any],
    text_vocabulary: vocabulary.Vocabulary,
    params: Params,
) -> None:
    files.write_atomic(
        folder / PARAMS, safetensors.numpy.save(table.leaves_by_path(jax.device_get(params)))
    )
    text_vocabulary.save(folder / VOCABULARY)
    files.write_json(folder / CONFIG, renames.to_stored(config))


def _load_model(folder: epath.Path, make_model: Callable[[], nnx.Module]) -> LoadedModel:
    """Loads the model of a folder. Unlike a checkpoint, equal parameters are stored as equal bytes."""
    graphdef, abstract = param_trees.describe(make_model, None)
    # Imported weights may be stored in a shorter format; an encoder computes in float32.
    params = weights.load_file(folder / PARAMS, abstract, np.dtype(np.float32))
    return LoadedModel(graphdef, params)


def _load_vocabulary(folder: epath.Path) -> TextVocabulary | None:
    if (folder / VOCABULARY).exists():
        return vocabulary.load_vocabulary(folder / VOCABULARY)
    return public_text.load_tokenizer(folder)


def _read_config(folder: epath.Path, family: str) -> dict[str, Any]:
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.pop("family", None) != family:
        raise UserError(f"{folder} does not contain a model of the family {family}.")
    return renames.from_stored(config)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
