"""Stage `tokenizer`: learns the text vocabulary and trains the image tokenizer, on seen classes only.

Each of the two may be given as a folder instead, such as an imported image tokenizer.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import checks, manifest_values, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline, vocabulary
from rag_mm.models import vqgan
from rag_mm.models.spae import autoencoder, code_restart, objective, spae_config
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.shared import (
    dead_codes,
    frozen,
    given_models,
    tokenizer_figures,
    world_config,
)
from rag_mm.train import loop, optimizer

INPUTS = ()
FOLDER = given_models.FOLDER


@dataclasses.dataclass(frozen=True)
class TextVocabularyConfig(given_models.GivenConfig):
    """The text vocabulary, learned from captions of training documents or given.

    Attributes:
        folder: run whose text tokenizer to use, or folder with a vocabulary.json, or with a public
            tokenizer.json that is a byte-level BPE as GPT-2's; `vocab_size` and `captions_per_image` are
            unused then. None learns one.
        vocab_size: number of text tokens, the 256 bytes included.
        num_sentinels: number of sentinel tokens, which replace masked spans.
        captions_per_image: captions of each training document to learn from.
    """

    vocab_size: int = 1024
    num_sentinels: int = 8
    captions_per_image: int = 2

    def __post_init__(self):
        checks.at_least(self, 256, "vocab_size")
        checks.at_least(self, 0, "num_sentinels")
        checks.at_least(self, 1, "captions_per_image")
        self.identify(given_models.text_fingerprint)


@dataclasses.dataclass(frozen=True)
class TokenizerStageConfig(given_models.GivenConfig):
    """How the text vocabulary and the image tokenizer are trained.

    Attributes:
        seed: seed of the initial weights and the order of images.
        world: world of the documents.
        model: architecture and loss of the image tokenizer.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        text: the text vocabulary.
        batch_size: images per step.
        num_init_images: number of images whose patches initialize the codebook by k-means.
        num_eval: number of test images for the metrics.
        folder: image tokenizer to use: a run, such as one of `rag-mm import image-tokenizer`, or its own
            folder. An imported one is used at the world's image size. None trains `model`, and in a world
            that is a corpus takes the corpus's, with its text vocabulary.
        image_sizes: heights in pixels of the square images that decoders are to read and write with this
            tokenizer; the world's comes first. Empty: the world's alone. The tokenizer is trained on the
            world's size.
        restart: moves codes of the codebook that are hardly used.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages | world_config.CorpusWorld
    model: spae_config.SPAEConfig
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    text: TextVocabularyConfig = dataclasses.field(default_factory=TextVocabularyConfig)
    batch_size: int = 128
    num_init_images: int = 2048
    num_eval: int = 1024
    image_sizes: tuple[int, ...] = dataclasses.field(
        default=(), metadata=manifest_values.ADDED_LATER
    )
    restart: code_restart.RestartConfig = dataclasses.field(
        default=code_restart.RestartConfig(), metadata=manifest_values.ADDED_LATER
    )
    scale: scaling.TokenizerScaleConfig = dataclasses.field(
        default=scaling.TokenizerScaleConfig(), metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 1, "num_eval")
        self.restart.check(self.model)
        if isinstance(self.world, world_config.CorpusWorld):
            self._take_that_of(self.world)
            return
        if self.image_sizes and self.image_sizes[0] != self.world.image_size:
            raise ValueError(
                f"image_sizes={self.image_sizes} must begin with the world's image size, "
                f"{self.world.image_size}"
            )
        if len(set(self.image_sizes)) < len(self.image_sizes) or (
            max(self.image_sizes, default=0) > self.world.image_size
        ):
            raise ValueError(
                f"image_sizes={self.image_sizes}; give each size once, none above the world's, since smaller "
                "images are scaled from its images"
            )
        self.identify(_given_fingerprint)
        if self.folder is not None:  # `model` is not used.
            self.fit_to_world(self.folder)
            return
        patches = self.num_init_images * self.model.levels[-1] ** 2
        if patches < self.model.codebook_size:
            raise ValueError(
                f"num_init_images={self.num_init_images} gives {patches} patches, fewer than "
                f"model.codebook_size={self.model.codebook_size}; give more"
            )
        if self.model.image_size != self.world.image_size:
            raise ValueError(
                f"model.image_size is {self.model.image_size}, but the world's images have "
                f"{self.world.image_size} x {self.world.image_size} pixels"
            )
        for size in self.image_sizes:
            self.model.grids_at(size, size)  # Raises where it has none.

    def _take_that_of(self, world: world_config.CorpusWorld) -> None:
        """Takes the image tokenizer of a corpus."""
        if self.folder is not None or self.image_sizes:
            raise ValueError(
                "the image tokenizer of a world of codes is its corpus's; leave folder and image_sizes out"
            )
        object.__setattr__(self, "folder", world.tokenizer)
        self.identify(_given_fingerprint)

    def fit_to_world(self, folder: str) -> frozen.ImageTokenizerConfig:
        """The config of the image tokenizer in `folder`, at the size of the world's images.

        Raises:
            UserError: it has no decoder, or does not take images of all sizes.
        """
        _, given = frozen.read_tokenizer_config(given_models.find_model(folder, "tokenizer"))
        sizes = (self.world.image_size, *self.image_sizes)
        if isinstance(given, vqgan.VQGANConfig):
            if not given.has_decoder:
                raise UserError(f"folder={folder} is an image tokenizer without a decoder.")
            try:
                fitted, *_ = [given.at_size(size) for size in sizes]
            except ValueError as error:
                raise UserError(f"folder={folder} does not fit the world: {error}.") from None
            return fitted
        if given.image_size != self.world.image_size:
            raise UserError(
                f"folder={folder} was trained on images of {given.image_size} pixels, but the world's have "
                f"{self.world.image_size}; make them agree."
            )
        for size in sizes:
            given.grids_at(size, size)
        return given


def make_mesh(config: TokenizerStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: TokenizerStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains both and writes them as a frozen model; measures on test images of held-out classes.

    Returns:
        What `tokenizer_figures.measure` does; {} in followers, and in a world without images.
    """
    if isinstance(config.world, world_config.CorpusWorld):
        return _copy(config, config.world.tokenizer, stage_dir / FOLDER)
    source = config.world.scenes("train", *world_config.SEEN)
    if config.folder is not None:
        return _take_given(config, config.folder, source, stage_dir / FOLDER)
    mesh = make_mesh(config)
    make_model = partial(_make_model, config)
    images = world_config.images(source)
    batches = pipeline.make_batches(
        images,
        config.batch_size,
        config.seed,
        lambda image, rng: {"images": image},
        rows=sharding.local_rows(config.batch_size, mesh),
        num_workers=config.scale.num_workers,
    )
    restart = dead_codes.make_rule(
        config.restart, config.model.codebook_size, config.loop.num_steps
    )
    params, _ = training.train(
        "tokenizer",
        stage_dir,
        make_model,
        objective.loss_fn,
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        prepare=partial(_with_codebook, config, images, mesh),
        what=training.WhatTrains(step_end=restart),
        derive=tokenizer_figures.derive,
    )
    if not multiprocess.is_leader():
        return {}
    text_vocabulary = _make_vocabulary(config, source, config.model.codebook_size)
    frozen.save_tokenizer(stage_dir / FOLDER, config.model, text_vocabulary, params)
    return _measure(config, frozen.FrozenTokenizer(stage_dir / FOLDER))


def load_tokenizer(path: epath.PathLike, image_batch: int | None = None) -> frozen.FrozenTokenizer:
    """Loads the image tokenizer of a run, or a frozen one from its own folder (as in a memory).

    Raises:
        UserError: there is no tokenizer, or its stage is unfinished or edited.
    """
    return frozen.FrozenTokenizer(given_models.find_model(path, "tokenizer"), image_batch)


def _make_model(config: TokenizerStageConfig) -> autoencoder.SPAE:
    scale, rngs = config.scale, nnx.Rngs(params=config.seed)
    return autoencoder.SPAE(config.model, rngs=rngs, dtype=scale.dtype, remat=scale.remat)


def _measure(config: TokenizerStageConfig, tokenizer: frozen.FrozenTokenizer) -> dict[str, Any]:
    assert not isinstance(config.world, world_config.CorpusWorld)
    test = tokenizer_figures.reconstruct(config.world, tokenizer, config.num_eval, config.seed)
    return tokenizer_figures.measure(tokenizer, test, config.image_sizes[1:])


def _given_fingerprint(folder: str) -> str:
    return given_models.model_fingerprint(folder, "tokenizer", frozen.IMAGE_TOKENIZERS)


def _copy(config: TokenizerStageConfig, given: str, folder: epath.Path) -> dict:
    """Copies an image tokenizer with its vocabulary, so that its fingerprint stays what it is."""
    if multiprocess.is_leader():
        given_models.copy_model(epath.Path(given), folder)
        config.check_unchanged(frozen.fingerprint(folder))
    return {}


def _take_given(
    config: TokenizerStageConfig,
    given: str,
    source: world_config.SplitDocuments,
    folder: epath.Path,
) -> dict:
    """Writes the given image tokenizer with the run's text vocabulary; returns what `run` does."""
    if not multiprocess.is_leader():
        return {}
    model, found = config.fit_to_world(given), given_models.find_model(given, "tokenizer")
    text_vocabulary = _make_vocabulary(config, source, model.codebook_size)
    given_models.copy_tokenizer(found, folder, model, text_vocabulary)
    config.check_unchanged(frozen.fingerprint(found))
    return _measure(config, frozen.FrozenTokenizer(folder))


def _make_vocabulary(
    config: TokenizerStageConfig, source: world_config.SplitDocuments, codebook_size: int
) -> vocabulary.Vocabulary:
    size, sentinels = config.text.vocab_size, config.text.num_sentinels
    if config.text.folder is not None:
        text = vocabulary.read_text_tokenizer(given_models.find_text(config.text.folder))
        config.text.check_unchanged(given_models.text_fingerprint(config.text.folder))
        return vocabulary.Vocabulary(text, codebook_size, sentinels, image_sizes=config.image_sizes)
    texts = [
        source.caption(i, caption_index)
        for i in range(len(source))
        for caption_index in range(config.text.captions_per_image)
    ]
    return vocabulary.train_vocabulary(texts, size, codebook_size, sentinels, config.image_sizes)


def _with_codebook(
    config: TokenizerStageConfig, images: np.ndarray, mesh: Mesh, params: Params
) -> Params:
    """The parameters with a codebook initialized from `images` uint8 [R, H, W, 3]."""
    graphdef = nnx.graphdef(jax.eval_shape(partial(_make_model, config)))
    rows = np.random.default_rng((config.seed, 1)).permutation(len(images))
    rows = rows[: config.num_init_images]

    @jax.jit
    def init(params, pixels):
        model = nnx.merge(graphdef, params)
        return objective.init_codebook(model, pixels, jax.random.key(config.seed))

    with jax.set_mesh(mesh):
        return params | {"codebook": init(params, images[rows])}
