"""Frozen models as self-contained folders: config, vocabulary and parameters.

A stage writes such a folder as its result, and a memory contains copies, so that a memory works without the
run that trained the models. A model's fingerprint is the digest of the folder's content, not of its path.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.convert import weights
from rag_mm.core import (
    batches,
    checks,
    code_grids,
    configuration,
    digests,
    files,
    image_files,
    renames,
)
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.data import public_text, vocabulary
from rag_mm.models import clip, emu3_vq, siglip2, vqgan
from rag_mm.models.spae import autoencoder, spae_config
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.train import checkpoint

TextVocabulary = vocabulary.Vocabulary | public_text.PublicTokenizer
RetrieverConfig = clip.CLIPConfig | siglip2.SigLIP2Config
ImageTokenizerConfig = spae_config.SPAEConfig | vqgan.VQGANConfig
CONFIG, VOCABULARY, PARAMS = "config.json", "vocabulary.json", "params.safetensors"
TOKEN_IDS = "token_ids.json"  # of an imported image tokenizer: the token of each code
WORDS = "words.json"  # of an image tokenizer whose codes are words of a language model
GUIDE = "retriever"  # folder of the retriever that a guided image tokenizer reads images with
TEXT_BATCH = 256  # Texts encoded at once.
# Family -> the classes of config and model.
RETRIEVERS: dict[str, tuple[type[Any], Callable[..., nnx.Module]]] = {
    "clip": (clip.CLIPConfig, clip.CLIP),
    "siglip2": (siglip2.SigLIP2Config, siglip2.SigLIP2),
}
IMAGE_TOKENIZERS: dict[str, tuple[type[Any], Callable[..., nnx.Module]]] = {
    "spae": (spae_config.SPAEConfig, autoencoder.SPAE),
    "vqgan": (vqgan.VQGANConfig, vqgan.VQGAN),
    "emu3_vq": (emu3_vq.Emu3VQConfig, emu3_vq.Emu3VQ),
}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """The structure and the parameters of a model."""

    graphdef: nnx.GraphDef
    params: Params

    def compile(self, method: str, static: str | None = None) -> Callable[..., jax.Array]:
        """A method of the model as a compiled function of arrays.

        Args:
            method: its name, dotted if it is a part's.
            static: name of an argument that is no array; the function compiles once for each of its values.
        """

        @functools.partial(jax.jit, static_argnames=static)
        def call(params: Params, *arrays: jax.Array, **options: Any) -> Any:
            model = nnx.merge(self.graphdef, params)
            return operator.attrgetter(method)(model)(*arrays, **options)

        return functools.partial(call, self.params)


class FrozenRetriever:
    """A frozen CLIP or SigLIP 2 with its text tokenizer: a memory's `memory.model_protocols.Encoder`.

    Attributes:
        config: sizes of the model, by which its family can be told.
        model: structure and parameters of both towers.
    """

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
        family, values = read_config(folder, RETRIEVERS)
        config_class, make_model = RETRIEVERS[family]
        self.config: RetrieverConfig = configuration.make(
            config_class, values, str(folder / CONFIG)
        )
        self.vocabulary = _load_vocabulary(folder)
        if family == "siglip2" and isinstance(self.vocabulary, public_text.PublicTokenizer):
            self.vocabulary = public_text.fold_case(self.vocabulary)
        self.fingerprint = fingerprint(folder)
        self.dim, self.image_size = self.config.projection_dim, self.config.image_size
        self.image_batch = image_batch or image_ops.num_at_once(self.image_size)
        self.text_batch = TEXT_BATCH
        self.model = _load_model(folder, lambda: make_model(self.config, rngs=nnx.Rngs(0)))
        self._encode_image = self.model.compile("encode_image")
        self._encode_tokens = self.model.compile("vision.tokens")
        self._encode_text = self.model.compile("encode_text")

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings float32 [B, D], of length 1, of images uint8 [B, H, W, 3], scaled to `image_size`."""
        return self._encode(self._encode_image, pixels)

    def encode_image_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """Tokens float32 [B, M, C] of images as of `encode_image`: of the class, then of the patches.

        They are those of the image tower's last block, before its last norm and the projection. A SigLIP 2
        has no token of the class.
        """
        return self._encode(self._encode_tokens, pixels)

    def encode_grid(self, pixels: np.ndarray) -> np.ndarray:
        """As `encode_image`, of images uint8 [B, H, W, 3] that are not scaled.

        H and W are `image_size` or, of a SigLIP 2 that takes any aspect, multiples of its patches.
        """
        call = lambda batch: self._encode_image(image_ops.to_float(batch))
        return in_batches(call, pixels, self.image_batch)

    def _encode(self, encode: Callable[[jax.Array], jax.Array], pixels: np.ndarray) -> np.ndarray:
        size = self.image_size
        if pixels.shape[1:3] != (size, size):
            pixels = np.stack([image_files.fit(image, size) for image in pixels])
        return in_batches(lambda batch: encode(image_ops.to_float(batch)), pixels, self.image_batch)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Embeddings float32 [B, D], of length 1; texts longer than the tower's limit are truncated.

        Raises:
            UserError: this model was imported without its tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.folder} has no tokenizer and cannot encode text; import it from a folder with "
                f"{public_text.TOKENIZER}, or {public_text.VOCABULARY} and {public_text.MERGES}."
            )
        if isinstance(self.config, siglip2.SigLIP2Config):
            if not isinstance(self.vocabulary, public_text.PublicTokenizer):
                raise UserError(
                    f"{self.folder} has another tokenizer than a SigLIP 2; import it anew."
                )
            tokens = _padded_tokens(self.config, self.vocabulary, texts)
        else:
            tokens = text_tokens(self.config, self.vocabulary, texts)
        return in_batches(self._encode_text, tokens, self.text_batch)


class FrozenTokenizer:
    """A frozen image tokenizer, trained here or imported (`memory.model_protocols.ImageTokenizer`).

    Attributes:
        config: sizes of the model, by which its family can be told.
        image_size: side of the images in pixels, unless they are given in another size.
        grids: (rows, columns) of each grid of the codes of an image of `image_size`, coarse to fine; an
            imported one has one grid.
        num_codes: codes per image of `image_size`.
        codebook_size: number of different codes.
        token_ids: int32 [codebook_size], the id of each code in the vocabulary of its language model; the
            codes themselves where it has no vocabulary or, as Janus, keeps codes apart.
        fingerprint: digest of the folder's content.
        image_batch: images of `image_size` encoded or decoded at once; as many pixels for other sizes.
        words: the word of each code, None unless its codebook is of a language model.
        guide: the retriever whose embeddings of the images it also encodes, None unless it is guided.
        model: the network, whose methods take and give images in 0..1.
    """

    def __init__(self, folder: epath.PathLike, image_batch: int | None = None):
        """Loads what `save_tokenizer` or an import wrote; arguments and errors as of `FrozenRetriever`."""
        self.folder = folder = epath.Path(folder)
        self.config: ImageTokenizerConfig
        family, self.config = read_tokenizer_config(folder)
        make_model = IMAGE_TOKENIZERS[family][1]
        self.words = _read_words(folder, self.config)
        has_vocabulary = (folder / VOCABULARY).exists()
        self._vocabulary = (
            vocabulary.load_vocabulary(folder / VOCABULARY) if has_vocabulary else None
        )
        self.fingerprint = fingerprint(folder)
        self.image_size, self.num_codes = self.config.image_size, self.config.num_codes
        self.codebook_size = self.config.codebook_size
        self.grids = self.grids_at(self.image_size, self.image_size)
        self.token_ids = self._read_token_ids()
        self.image_batch = image_batch or image_ops.num_at_once(self.image_size)
        self.model = _load_model(folder, lambda: make_model(self.config, rngs=nnx.Rngs(0)))
        is_guided = isinstance(self.config, spae_config.SPAEConfig) and self.config.guide_dim > 0
        self.guide = FrozenRetriever(folder / GUIDE) if is_guided else None
        self._encode = self.model.compile("encode")
        self._decode = self.model.compile("decode", static="grids")

    @property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """The vocabulary of texts and these codes.

        Raises:
            UserError: there is none, as in an imported image tokenizer or one whose codes are words.
        """
        if self._vocabulary is None:
            raise UserError(f"{self.folder} holds an image tokenizer without a text vocabulary.")
        return self._vocabulary

    def grids_at(self, height: int, width: int) -> Grids:
        """(rows, columns) of each grid of the codes of an image of `height` x `width` pixels, coarse to fine.

        A trained image tokenizer takes sizes that every grid divides, and the grids grow with the image. An
        imported one takes any size; its grid has `height // config.code_size` rows, likewise columns.

        Raises:
            UserError: it does not take this size.
        """
        return self.config.grids_at(height, width)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int32 [B, N] of images uint8 [B, H, W, 3]: those of the grids in `grids_at(H, W)` in turn.

        Codes are in raster order within a grid.

        Raises:
            UserError: this image tokenizer does not take images of this size.
        """
        height, width = pixels.shape[1:3]
        self.grids_at(height, width)

        def encode(batch: np.ndarray) -> jax.Array:
            further = () if self.guide is None else (self.guide.encode_image(batch),)
            return self._encode(image_ops.to_float(batch), *further)

        return in_batches(encode, pixels, self._num_at_once(height, width))

    def decode(
        self, codes: np.ndarray, num_levels: int | None = None, grids: Grids | None = None
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] of codes int32 [B, N].

        Args:
            codes: of all grids, or of the first few.
            num_levels: how many of the grids to decode, coarse to fine; None for all in `codes`.
            grids: all grids of images of this size, from `grids_at`; None for images of `image_size`.

        Raises:
            UserError: this image tokenizer has no decoder, or the codes are not those of the first few grids.
        """
        if isinstance(self.config, vqgan.VQGANConfig) and not self.config.has_decoder:
            raise UserError(
                f"{self.folder} was imported without a decoder, so codes have no pixels."
            )
        grids = self.grids if grids is None else tuple((rows, columns) for rows, columns in grids)
        height, width = (side * self.config.code_size for side in grids[-1])
        if grids != self.grids_at(height, width):
            raise UserError(f"This image tokenizer has no grids {grids}; get them by `grids_at`.")
        codes = self._first_codes(codes, num_levels, grids)
        return in_batches(
            lambda batch: image_ops.to_uint8(self._decode(batch, grids=grids)),
            codes,
            self._num_at_once(height, width),
        )

    def _first_codes(self, codes: np.ndarray, num_levels: int | None, grids: Grids) -> np.ndarray:
        """The codes of the first `num_levels` grids, None for all that are given."""
        given, ends = codes.shape[1], code_grids.ends(grids)
        if given not in ends:
            raise UserError(
                f"{given} codes are not those of the first few of the grids {grids}; give the `grids` of "
                "these images."
            )
        most = ends.index(given) + 1
        if num_levels is not None and not 1 <= num_levels <= most:
            raise UserError(f"num_levels is {num_levels}, but the codes have 1 to {most} levels.")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise UserError(
                f"Codes are {codes.min()} to {codes.max()}, but the codebook has 0 to "
                f"{self.codebook_size - 1}; give codes, not tokens."
            )
        return codes[:, : ends[(num_levels or most) - 1]]

    def _num_at_once(self, height: int, width: int) -> int:
        return max(1, self.image_batch * self.image_size**2 // (height * width))

    def _check_token_ids(self, path: epath.Path) -> np.ndarray:
        ids = files.read_object(path, token_ids=list)["token_ids"]
        if any(type(each) is not int or not 0 <= each < 1 << 31 for each in ids):
            raise UserError(f"{path} is damaged: a token id is no integer from 0.")
        return np.asarray(ids, np.int32)

    def _read_token_ids(self) -> np.ndarray:
        if (self.folder / TOKEN_IDS).exists():
            return self._check_token_ids(self.folder / TOKEN_IDS)
        offset = 0 if self._vocabulary is None else self._vocabulary.code_offset
        return offset + np.arange(self.codebook_size, dtype=np.int32)


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
    config: spae_config.SPAEConfig,
    text_vocabulary: vocabulary.Vocabulary | None,
    params: Params,
    words: Sequence[str] = (),
) -> None:
    """Writes a folder that `FrozenTokenizer` loads.

    Args:
        folder: where; a guided model's retriever is to be copied to its `GUIDE` by the caller.
        config: the model's sizes.
        text_vocabulary: of texts and these codes; None if the codes are words.
        params: the model's parameters.
        words: the word of each code, if they are words.
    """
    if words:
        files.write_json(folder / WORDS, {"words": list(words)})
    _save(folder, {"family": "spae", **dataclasses.asdict(config)}, text_vocabulary, params)


def read_config(folder: epath.Path, families: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The family of the model in a folder, one of `families`, and its config.

    Raises:
        UserError: there is no model, or it is of another family.
    """
    config = files.read_json(folder / CONFIG)
    family = str(config.pop("family", None)) if isinstance(config, dict) else ""
    if family not in families:
        wanted = " or ".join(families)
        raise UserError(f"{folder} does not contain a model of the family {wanted}.")
    checks.sizes(config, str(folder / CONFIG))
    return family, renames.from_stored(config)


def read_tokenizer_config(folder: epath.Path) -> tuple[str, ImageTokenizerConfig]:
    """The family and the config of the image tokenizer in a folder; raises as `read_config` does."""
    family, values = read_config(folder, IMAGE_TOKENIZERS)
    return family, configuration.make(IMAGE_TOKENIZERS[family][0], values, str(folder / CONFIG))


def load_params(
    folder: epath.Path, make_model: Callable[[], nnx.Module], mesh: Mesh | None = None
) -> LoadedModel:
    """Loads a model from parameters that `checkpoint.save_params` wrote, on a mesh or on one device.

    Raises:
        UserError: there are no parameters, or they belong to another model, or do not split over the mesh.
    """
    graphdef, abstract = param_trees.describe(make_model, mesh)
    param_trees.check_split(abstract, "Give another mesh")
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


def _padded_tokens(
    config: siglip2.SigLIP2Config, text: public_text.PublicTokenizer, texts: list[str]
) -> np.ndarray:
    """Token ids of texts, truncated before the special tokens at their ends, and padded, as `text_tokens`."""
    tokens = np.full((len(texts), config.max_text_len), config.padding, np.int32)
    for row, each in zip(tokens, texts, strict=True):
        ids = text.encode_within(each, config.max_text_len)
        row[: len(ids)] = ids
    return tokens


def in_batches(
    call: Callable[[np.ndarray], jax.Array], rows: np.ndarray, batch_size: int
) -> np.ndarray:
    """Applies `call` to at least one row, in full batches and a last one of a power of two of rows."""
    results = [np.asarray(call(rows[part])) for part in batches.split(len(rows), batch_size)]
    return np.concatenate(results)[: len(rows)]


def _save(
    folder: epath.Path,
    config: Mapping[str, Any],
    text_vocabulary: vocabulary.Vocabulary | None,
    params: Params,
) -> None:
    files.write_atomic(
        folder / PARAMS, safetensors.numpy.save(param_trees.leaves_by_path(jax.device_get(params)))
    )
    if text_vocabulary is not None:
        text_vocabulary.save(folder / VOCABULARY)
    files.write_json(folder / CONFIG, renames.to_stored(config))


def _load_model(folder: epath.Path, make_model: Callable[[], nnx.Module]) -> LoadedModel:
    """Loads the model of a folder. Unlike a checkpoint, equal parameters are stored as equal bytes."""
    try:
        graphdef, abstract = param_trees.describe(make_model, None)
    except (TypeError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
        raise UserError(f"{folder / CONFIG} describes no model: {str(error)[:200]}.") from error
    # Imported weights may be stored in a shorter format; an encoder computes in float32.
    params = weights.load_file(folder / PARAMS, abstract, np.dtype(np.float32))
    return LoadedModel(graphdef, params)


def _read_words(folder: epath.Path, config: ImageTokenizerConfig) -> tuple[str, ...] | None:
    """The word of each code; None if the codes are no words."""
    if not isinstance(config, spae_config.SPAEConfig) or config.codebook == "learned":
        return None
    words = files.read_object(folder / WORDS, words=list)["words"]
    if any(type(word) is not str for word in words) or len(words) != config.codebook_size:
        raise UserError(f"{folder / WORDS} is damaged: give {config.codebook_size:,} words.")
    return tuple(words)


def _load_vocabulary(folder: epath.Path) -> TextVocabulary | None:
    if (folder / VOCABULARY).exists():
        return vocabulary.load_vocabulary(folder / VOCABULARY)
    return public_text.load_tokenizer(folder)
