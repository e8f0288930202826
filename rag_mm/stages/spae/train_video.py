"""Stage `spae_video`: inflates a trained image tokenizer to clips of the emoji world, and trains it on them.

Its result is compared with the image tokenizer frame by frame, which has the same networks and codebook.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.convert import weights
from rag_mm.core import checks, code_grids, configuration, files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.models.spae import autoencoder, objective, video
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.models.spae.video_config import VideoConfig
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.shared import (
    frozen,
    given_models,
    tokenizer_figures,
    world_config,
)
from rag_mm.train import loop, optimizer
from rag_mm.worlds.emoji import emoji_scenes, scene_clips

FOLDER, CONFIG, PARAMS = "clips", frozen.CONFIG, frozen.PARAMS
_CLIPS_AT_ONCE = 32
EVAL_SEED = 7  # of the test clips' directions and starts


@dataclasses.dataclass(frozen=True)
class VideoStageConfig(given_models.GivenConfig):
    """How clips are coded and trained.

    Attributes:
        folder: run or folder of the image tokenizer to start from, without a guide and with plain averages.
            None: the run's own stage spae.
        seed: seed of the order of clips and of what moves where.
        world: world of the clips' entities.
        optimizer: learning rate, schedule, moments and moving averages.
        loop: number of steps, logging and checkpoints.
        num_frames: frames that are coded together, a divisor of a clip's 8; with 1 the stage trains the image
            tokenizer on frames of the same clips, the control of what time gives.
        time_stride, level_frames: see `video_config.VideoConfig`.
        inflation: central | average, see `video.inflate`.
        batch_size: clips per step.
        num_eval: test clips for the metrics.
        eval_splits: splits of classes that they show.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    num_frames: int = scene_clips.NUM_FRAMES
    time_stride: int = 1
    level_frames: tuple[int, ...] = ()
    inflation: str = "central"
    batch_size: int = 8
    num_eval: int = 512
    eval_splits: tuple[str, ...] = world_config.TEST
    scale: scaling.TokenizerScaleConfig = dataclasses.field(
        default_factory=scaling.TokenizerScaleConfig
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 1, "num_eval")
        checks.one_of(self, "inflation", video.INFLATIONS)
        checks.one_of(self, "num_frames", (1, 2, 4, 8))
        self.identify(lambda folder: frozen.fingerprint(given_models.find_model(folder, "spae")))

    def clips_of(self, image: SPAEConfig) -> VideoConfig:
        """The sizes of the clip tokenizer that starts from an image tokenizer.

        Raises:
            UserError: they do not fit each other, or the image tokenizer the world.
        """
        if image.image_size != self.world.image_size:
            raise UserError(
                f"The image tokenizer takes {image.image_size} pixels, the world's images have "
                f"{self.world.image_size}; make them agree."
            )
        return VideoConfig(image, self.num_frames, self.time_stride, self.level_frames)


def inputs(config: VideoStageConfig) -> tuple[str, ...]:
    """The stages that it reads with this config."""
    return () if config.folder else ("spae",)


def make_mesh(config: VideoStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: VideoStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the clip tokenizer and writes it into `clips`; measures on clips of held-out classes.

    Returns:
        See `measure`. {} in followers.
    """
    own = None if config.folder else run.finished_stage("spae") / given_models.FOLDER
    image_folder = own or given_models.find_model(config.folder or "", "spae")
    family, image = frozen.read_tokenizer_config(image_folder)
    if not isinstance(image, SPAEConfig):
        raise UserError(f"{image_folder} is an image tokenizer of the family {family}, not spae.")
    clips = config.clips_of(image)
    params = _train(config, clips, image_folder, stage_dir)
    if not multiprocess.is_leader():
        return {}
    _save(stage_dir / FOLDER, clips, jax.device_get(params))
    tokenizer = FrozenClips(stage_dir / FOLDER)
    return measure(tokenizer, frozen.FrozenTokenizer(image_folder), eval_clips(config))


def _train(
    config: VideoStageConfig, clips: VideoConfig, image_folder: epath.Path, stage_dir: epath.Path
) -> Params:
    scenes, mesh = config.world.scenes("train", *world_config.SEEN), make_mesh(config)
    batches = pipeline.make_batches(
        np.arange(len(scenes)),
        config.batch_size,
        config.seed,
        partial(_make_example, scenes, config.num_frames),
        rows=sharding.local_rows(config.batch_size, mesh),
        num_workers=config.scale.num_workers,
    )
    params, _ = training.train(
        "spae_video",
        stage_dir,
        partial(_make_model, config, clips),
        video.clip_loss,
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        start=partial(_inflated, config, clips.image, image_folder),
        what=training.WhatTrains(
            lambda path: clips.image.codebook == "language" and path == "codebook"
        ),
        derive=tokenizer_figures.derive,
    )
    return params


def _make_model(config: VideoStageConfig, clips: VideoConfig) -> video.VideoSPAE:
    scale, rngs = config.scale, nnx.Rngs(params=config.seed)
    return video.VideoSPAE(clips, rngs=rngs, dtype=scale.dtype, remat=scale.remat)


def _inflated(
    config: VideoStageConfig, image: SPAEConfig, image_folder: epath.Path, abstract: Params
) -> Params:
    """The image tokenizer's parameters, inflated, in the shardings of `abstract`."""
    make = lambda: autoencoder.SPAE(image, rngs=nnx.Rngs(0))
    of_image = param_trees.describe(make, None)[1]
    given = weights.load_file(image_folder / PARAMS, of_image, np.dtype(np.float32))
    put = lambda value, leaf: jax.device_put(np.asarray(value), leaf.sharding)
    return jax.tree.map(put, video.inflate(given, config.inflation), abstract)


def _make_example(
    scenes: emoji_scenes.Scenes, num_frames: int, index: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Some successive frames of a clip."""
    level = scenes.levels[index]
    frames = scene_clips.sample_clip(scenes.facts(int(index)), level, rng)
    start = int(rng.integers(len(frames) // num_frames)) * num_frames
    return {"clips": scene_clips.draw_clip(frames[start : start + num_frames], level)}


def eval_clips(config: VideoStageConfig) -> np.ndarray:
    """Clips of the evaluated classes, uint8 [B, T, H, W, 3]; the same for the same seed."""
    scenes = config.world.scenes("test", *config.eval_splits)
    rows = world_config.sample_rows(scenes, config.num_eval, config.seed)
    rng = np.random.default_rng((config.seed, EVAL_SEED))
    make = partial(_make_example, scenes, scene_clips.NUM_FRAMES)
    return np.stack([make(int(row), rng)["clips"] for row in rows])


class FrozenClips:
    """A trained clip tokenizer.

    Attributes:
        config: its sizes.
    """

    def __init__(self, folder: epath.PathLike):
        """Loads the folder `clips` of the stage.

        Raises:
            UserError: it is missing or damaged.
        """
        folder = epath.Path(folder)
        values = files.read_json(folder / CONFIG)
        self.config = configuration.make(VideoConfig, values, str(folder / CONFIG))
        make = lambda: video.VideoSPAE(self.config, rngs=nnx.Rngs(0))
        graphdef, abstract = param_trees.describe(make, None)
        params = weights.load_file(folder / PARAMS, abstract, np.dtype(np.float32))
        self._model = frozen.LoadedModel(graphdef, params)
        self._encode, self._decode = map(self._model.compile, ("encode", "decode"))

    def encode(self, clips: np.ndarray) -> np.ndarray:
        """Codes int32 [B, N] of clips uint8 [B, T, H, W, 3]."""
        return frozen.in_batches(
            lambda part: self._encode(image_ops.to_float(part)), clips, _CLIPS_AT_ONCE
        )

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Clips uint8 [B, T, H, W, 3] from the codes of all levels, or of the first few."""
        return frozen.in_batches(
            lambda part: image_ops.to_uint8(self._decode(part)), codes, _CLIPS_AT_ONCE
        )


def _save(folder: epath.Path, config: VideoConfig, params: Params) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / PARAMS, safetensors.numpy.save(param_trees.leaves_by_path(params)))
    files.write_json(folder / CONFIG, dataclasses.asdict(config))


def measure(
    tokenizer: FrozenClips, image_tokenizer: frozen.FrozenTokenizer, clips: np.ndarray
) -> dict[str, Any]:
    """PSNR in dB and codes of a clip, of the clip tokenizer and of the image tokenizer frame by frame.

    Args:
        tokenizer: of clips, or of as many of their frames at a time as its config has.
        image_tokenizer: the one that it started from.
        clips: uint8 [B, T, H, W, 3].

    Returns:
        `psnr` and `num_codes` of all levels, and under `level1` and so on of the levels up to it; beside
        each, under `frame_by_frame`, those of the image tokenizer and as many levels, whose codes are at
        least as many.
    """
    num_frames, sizes = tokenizer.config.num_frames, clips.shape[2:]
    parts, frames = clips.reshape(-1, num_frames, *sizes), clips.reshape(-1, *sizes)
    codes, num_parts = tokenizer.encode(parts), clips.shape[1] // num_frames
    image_codes = image_tokenizer.encode(frames)
    by_level: dict[str, Any] = {}
    image_ends = code_grids.ends(image_tokenizer.grids)
    for number, (end, image_end) in enumerate(
        zip(tokenizer.config.ends, image_ends, strict=True), 1
    ):
        made = image_tokenizer.decode(image_codes[:, :image_end], number)
        by_level[f"level{number}"] = {
            "psnr": _psnr(tokenizer.decode(codes[:, :end]), parts),
            "num_codes": end * num_parts,
            "frame_by_frame": {
                "psnr": _psnr(made, frames),
                "num_codes": image_end * clips.shape[1],
            },
        }
    return by_level[f"level{len(image_ends)}"] | by_level


def _psnr(made: np.ndarray, wanted: np.ndarray) -> float:
    return objective.psnr(np.square((made.astype(np.float64) - wanted) / 255).mean())
