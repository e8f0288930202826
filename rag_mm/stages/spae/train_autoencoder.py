"""Stage `spae`: trains SPAE's autoencoder over a frozen codebook of words, or over a learned one.

Its result is an image tokenizer whose codes are words, which other stages and commands load as any other.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import checks, code_grids, files, manifest_values, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.models.spae import autoencoder, code_restart, objective, spae_config
from rag_mm.models.spae.semantic import SemanticConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.shared import (
    dead_codes,
    frozen,
    given_models,
    tokenizer_figures,
    world_config,
)
from rag_mm.stages.spae import (
    added_losses,
    build_codebook,
    first_params,
    rank_words,
    word_figures,
    word_images,
)
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.train import loop, optimizer, train_step

FOLDER = given_models.FOLDER


@dataclasses.dataclass(frozen=True)
class SPAEStageConfig:
    """How the autoencoder is trained and measured.

    Attributes:
        seed: seed of the initial weights and the order of images.
        world: world of the images.
        model: architecture and codebook. With a language codebook, `codebook_size` and `embed_dim` are those
            of the stage language_codebook; `guide_dim` is 0 or the width of the retriever's embeddings.
        optimizer: learning rate, schedule, moments and moving averages.
        loop: number of steps, logging and checkpoints.
        semantic: attraction of codes to words that fit the image.
        losses: perceptual and adversarial losses.
        batch_size: images per step.
        num_init_images: number of images that the start is computed from.
        num_eval: number of test images for the metrics.
        eval_splits: splits of classes that they show: test for results, tune for choosing settings.
        codebook_start: kmeans | random: what a learned codebook starts as.
        restart: moves codes of a learned codebook that are hardly used.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    model: spae_config.SPAEConfig
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    semantic: SemanticConfig = dataclasses.field(default_factory=SemanticConfig)
    losses: added_losses.AddedLossesConfig = dataclasses.field(
        default_factory=added_losses.AddedLossesConfig
    )
    batch_size: int = 16
    num_init_images: int = 1024
    num_eval: int = 1024
    eval_splits: tuple[str, ...] = world_config.TEST
    codebook_start: str = dataclasses.field(default="kmeans", metadata=manifest_values.ADDED_LATER)
    restart: code_restart.RestartConfig = dataclasses.field(
        default=code_restart.RestartConfig(), metadata=manifest_values.ADDED_LATER
    )
    scale: scaling.TokenizerScaleConfig = dataclasses.field(
        default_factory=scaling.TokenizerScaleConfig
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 1, "num_eval", "num_init_images")
        checks.one_of(self, "codebook_start", ("kmeans", "random"))
        self.restart.check(self.model)
        if self.model.image_size != self.world.image_size:
            raise ValueError(
                f"model.image_size is {self.model.image_size}, but the world's images have "
                f"{self.world.image_size} x {self.world.image_size} pixels"
            )
        is_language = self.model.codebook == "language"
        if not is_language and (self.semantic.alpha or self.model.guide_dim):
            raise ValueError("semantic.alpha and model.guide_dim need model.codebook=language")
        if self.uses_pools and self.model.random_flip_rotate:
            raise ValueError(
                "words are ranked for images as they are; set model.random_flip_rotate=False"
            )
        patches = self.num_init_images * self.model.levels[-1] ** 2
        if not is_language and patches < self.model.codebook_size:
            raise ValueError(
                f"num_init_images={self.num_init_images} gives {patches} patches, fewer than "
                f"model.codebook_size={self.model.codebook_size}; give more"
            )

    @property
    def uses_pools(self) -> bool:
        """Whether training reads embeddings of the images, or words that fit them."""
        return bool(self.semantic.alpha or self.model.guide_dim)


def inputs(config: SPAEStageConfig) -> tuple[str, ...]:
    """The stages that it reads with this config."""
    codebook = ("language_codebook",) if config.model.codebook == "language" else ()
    pools = ("word_pools",) if config.uses_pools else ()
    needs_retriever = config.uses_pools or config.losses.needs_retriever
    return (*codebook, *pools, *(("retriever",) if needs_retriever else ()))


def make_mesh(config: SPAEStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: SPAEStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the autoencoder, writes it as a frozen image tokenizer, and measures it on test images.

    Returns:
        What `tokenizer_figures.measure` does; with a language codebook `codebook_digest`, which is that of
        the given one; with features of words the means of `word_figures.per_image` and
        `word_figures.overlap`. {} in followers.

    Raises:
        RuntimeError: training has changed the language codebook.
    """
    is_language = config.model.codebook == "language"
    codebook, pools = None, None
    if is_language:
        codebook = build_codebook.load(run.finished_stage("language_codebook"))
        _check_codebook(config.model, codebook)
    if config.uses_pools:
        pools = rank_words.load(run.finished_stage("word_pools"))
        _check_guide(config.model, pools)
    retriever = None
    if config.losses.needs_retriever:
        retriever = given_models.find_model(run.workdir, "retriever")
    params = _train(config, codebook, pools, retriever, stage_dir)
    if not multiprocess.is_leader():
        return {}
    params = jax.device_get(params)
    folder = stage_dir / FOLDER
    _save(config, folder, params, codebook)
    tokenizer = frozen.FrozenTokenizer(folder)
    test = tokenizer_figures.reconstruct(
        config.world, tokenizer, config.num_eval, config.seed, config.eval_splits
    )
    metrics = tokenizer_figures.measure(tokenizer, test)
    values = _per_image(config, tokenizer, test, codebook)
    files.write_json(stage_dir / PER_DOCUMENT, {"held_out": _to_lists(values)})
    if codebook is None:
        return metrics
    metrics["codebook_digest"] = build_codebook.digest_of(params["codebook"])
    if metrics["codebook_digest"] != build_codebook.digest_of(codebook.table):
        raise RuntimeError("spae: the language codebook changed while training")
    return metrics | word_figures.means({k: v for k, v in values.items() if k != "psnr"})


def _save(
    config: SPAEStageConfig,
    folder: epath.Path,
    params: Params,
    codebook: build_codebook.LanguageCodebook | None,
) -> None:
    """Writes the folder of the image tokenizer, with words, their features and the retriever if any."""
    words = () if codebook is None else codebook.words
    if codebook is not None and codebook.retriever is not None:
        given_models.copy_model(codebook.retriever, folder / frozen.GUIDE)
        files.write_array(folder / word_images.FEATURES, codebook.features["all_names"])
    frozen.save_tokenizer(folder, config.model, None, params, words)


def _per_image(
    config: SPAEStageConfig,
    tokenizer: frozen.FrozenTokenizer,
    test: tokenizer_figures.TestImages,
    codebook: build_codebook.LanguageCodebook | None,
) -> dict[str, Any]:
    """Figures of each test image: PSNR by prefix, sharpness, and those of words with features."""
    ends = code_grids.ends(tokenizer.grids)
    by_prefix = {f"first{end}": psnr for end, psnr in zip(ends, test.psnr, strict=True)}
    values: dict[str, Any] = {"psnr": by_prefix | {"all": test.psnr[-1]}}
    values["sharpness"] = {"all": test.sharpness}
    if codebook is None or codebook.retriever is None:
        return values
    embeddings = frozen.FrozenRetriever(codebook.retriever).encode_image(test.images)
    words = word_figures.describe(test.source, test.rows, tokenizer, test.codes)
    values["words"] = word_figures.per_image(words, embeddings, codebook.features)
    return values | {"overlap": word_figures.overlap(words, config.seed)}


def _to_lists(tree: Any) -> Any:
    return jax.tree.map(lambda values: np.asarray(values, np.float64).tolist(), tree)


def _check_codebook(
    model: spae_config.SPAEConfig, codebook: build_codebook.LanguageCodebook
) -> None:
    size, dim = codebook.table.shape
    if (size, dim) != (model.codebook_size, model.embed_dim):
        raise UserError(
            f"The language codebook has {size:,} words of width {dim}, but the model codebook_size="
            f"{model.codebook_size:,} and embed_dim={model.embed_dim}; make them agree."
        )


def _check_guide(model: spae_config.SPAEConfig, pools: rank_words.WordPools) -> None:
    width = pools.embeddings.shape[1]
    if model.guide_dim not in (0, width):
        raise UserError(
            f"model.guide_dim is {model.guide_dim}, but the retriever's embeddings have width {width}."
        )


def _train(
    config: SPAEStageConfig,
    codebook: build_codebook.LanguageCodebook | None,
    pools: rank_words.WordPools | None,
    retriever: epath.Path | None,
    stage_dir: epath.Path,
) -> Params:
    source = config.world.scenes("train", *world_config.SEEN)

    def take(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = {"images": world_config.images(source, rows)}
        if pools is None:
            return batch
        named = {"pool_words": pools.words[rows], "pool_sizes": pools.sizes[rows]}
        return batch | named | {"embeddings": pools.embeddings[rows]}

    mesh = make_mesh(config)
    batches = pipeline.make_array_batches(
        len(source),
        config.batch_size,
        config.seed,
        take,
        rows=sharding.local_rows(config.batch_size, mesh),
    )
    make_model, loss_fn, what = step_parts(config, retriever)
    rows = np.random.default_rng((config.seed, 1)).permutation(len(source))
    sample = world_config.images(source, np.sort(rows[: config.num_init_images]))
    prepare = None
    if codebook is not None:
        prepare = partial(first_params.words, config.model, codebook, pools, sample, config.seed)
    elif config.codebook_start == "kmeans":
        prepare = partial(first_params.kmeans, make_model, sample, config.seed, mesh)
    params, _ = training.train(
        "spae",
        stage_dir,
        make_model,
        loss_fn,
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        start=partial(added_losses.start, config.losses, retriever),
        prepare=prepare,
        what=what,
        derive=tokenizer_figures.derive,
    )
    return added_losses.own(params)


def step_parts(
    config: SPAEStageConfig, retriever: epath.Path | None
) -> tuple[Callable[[], nnx.Module], train_step.LossFn, training.WhatTrains]:
    """What the training step is made of: the function that makes the model, its loss, and what trains.

    `retriever` is the folder of the run's frozen retriever, where `config.losses.needs_retriever`.
    """
    added, size = config.losses, config.model.image_size
    make_all = added_losses.extend(
        added, partial(_make_model, config), size, retriever, config.seed
    )
    loss_fn = partial(objective.loss_fn, semantic_config=config.semantic, weights=added.weights)
    is_frozen = lambda path: config.model.codebook == "language" and path == "codebook"
    what = added_losses.what_trains(added, objective.reconstruct, is_frozen)
    num_codes, num_steps = config.model.codebook_size, config.loop.num_steps
    restart = dead_codes.make_rule(config.restart, num_codes, num_steps)
    return make_all, loss_fn, dataclasses.replace(what, step_end=restart)


def _make_model(config: SPAEStageConfig) -> autoencoder.SPAE:
    scale, rngs = config.scale, nnx.Rngs(params=config.seed)
    return autoencoder.SPAE(config.model, rngs=rngs, dtype=scale.dtype, remat=scale.remat)
