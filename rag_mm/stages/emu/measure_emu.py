"""Stage `emu_figures`: measures a trained Emu on test scenes, part by part; finished parts are kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.core import checks, files, manifest_values, progress, run_folder, sharding
from rag_mm.eval import image_vectors
from rag_mm.nn import param_trees
from rag_mm.stages.emu import (
    kept_figures,
    rollout_figures,
    saved_emu,
    tested_scenes,
    text_control,
    text_figures,
    training_documents,
)
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.tested_scenes import EncodedPictures, TestedScenes
from rag_mm.stages.shared import frozen, train_retriever, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji.emoji_scenes import Scenes

INPUTS = ("retriever", "memory", "neighbors", "emu")
CAPTIONS, CANDIDATES, EXAMPLES = "captions.json", "candidates.json", "examples.json"
_NUM_EXAMPLES, _NUM_NEAREST = 12, 4
_SHARES = {
    *("random", "own", "same", "read_entity", "read_place", "read_color", "read_joint"),
    *("exact", "named", "place", "color", "direction"),
}
# (figure, ours, theirs) of differences paired by scene.
_PAIRS = (
    ("r2", "oracle", "none"),
    ("same", "oracle", "none"),
    ("same", "oracle", "wrong"),
    ("same", "retrieved", "none"),
    ("exact", "oracle", "none"),
    ("caption_nll", "oracle", "none"),
    ("direction", text_figures.IN_ORDER, text_figures.SHUFFLED),
)


@dataclasses.dataclass(frozen=True)
class EmuFiguresStageConfig:
    """What an Emu is measured on.

    Attributes:
        seed: seed of the candidates, and of oracle and wrong documents.
        world: world of the documents.
        num_scenes: test scenes of test classes, and of seen classes, at most `neighbors.num_test`.
        num_candidates: images among which the right one is to be found.
        num_stories: stories of test classes.
        num_clips: clips of test classes.
        num_readout: training pictures that the linear readout is fitted to.
        text_alone: folder of a run of the preset text_alone, whose NLL of captions this run's is divided by;
            None: no such figure.
        text_alone_fingerprint: of that run's figures. It is computed, so that another run is another config.
    """

    seed: int
    world: world_config.EmojiWorld
    num_scenes: int = 192
    num_candidates: int = 32
    num_stories: int = 256
    num_clips: int = 128
    num_readout: int = 6000
    text_alone: str | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    text_alone_fingerprint: str = dataclasses.field(
        init=False, default="", metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        names = ("num_scenes", "num_candidates", "num_stories", "num_clips", "num_readout")
        checks.at_least(self, 2, *names)
        if self.text_alone is not None:
            fingerprint = text_control.fingerprint(self.text_alone)
            object.__setattr__(self, "text_alone_fingerprint", fingerprint)


def run(config: EmuFiguresStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Measures everything, and keeps the values of each scene in `per_document.json`.

    Returns:
        By split (`held_out` and `seen`) the mean of each figure by variant, `paired` differences, and the
        numbers of `candidates`; of stories and clips under `held_out_stories` and `held_out_clips`; `codes`,
        how far the codes have collapsed; and with `text_alone` `nll_to_text_alone`, ratios by split.
    """
    context = _Context(config, run, stage_dir)
    parts: dict[str, Callable[[], Mapping[str, Any]]] = {
        "codes": context.collapse,
        "held_out": functools.partial(context.scenes, "held_out"),
        "seen": functools.partial(context.scenes, "seen"),
        "held_out_stories": context.stories,
        "held_out_clips": context.motion,
    }
    found: dict[str, Mapping[str, Any]] = {}
    with progress.track("emu_figures", len(parts)) as bar:
        for number, (name, make) in enumerate(parts.items(), 1):
            found[name] = kept_figures.once(stage_dir / f"part_{name}.json", make)
            bar.update(number)
    codes = dict(found.pop("codes"))
    files.write_json(stage_dir / PER_DOCUMENT, found)
    metrics: dict[str, Any] = {"codes": codes} | {
        name: kept_figures.summary(values, _SHARES, _PAIRS) for name, values in found.items()
    }
    for split in tested_scenes.SPLITS:
        metrics[split]["candidates"] = files.read_object(stage_dir / f"{split}_{CANDIDATES}")
    if config.text_alone is not None:
        metrics["nll_to_text_alone"] = _to_text_alone(config.text_alone, stage_dir, found)
    return metrics


def _to_text_alone(
    workdir: str, stage_dir: epath.Path, found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """By split and documents, the NLL of captions divided by that of a run trained on text alone."""
    wanted = {
        split: files.read_object(stage_dir / f"{split}_{CAPTIONS}")["wanted"]
        for split in tested_scenes.SPLITS
    }
    theirs = text_control.read(workdir, wanted, CAPTIONS)
    return {split: text_control.ratios(found[split], theirs[split]) for split in wanted}


@dataclasses.dataclass(frozen=True, eq=False)
class _Context:
    """The models, the pictures and what several parts need; loaded when first asked for."""

    config: EmuFiguresStageConfig
    run: run_folder.Run
    stage_dir: epath.Path

    @functools.cached_property
    def pictures(self) -> EncodedPictures:
        emu = saved_emu.load(self.run.finished_stage("emu"))
        return EncodedPictures(Album(), train_retriever.load_encoder(self.run.workdir), emu)

    def scenes(self, split: str) -> dict[str, Any]:
        """Rollouts and captions of the test scenes of a split; writes the captions."""
        config, pictures = self.config, self.pictures
        tested = tested_scenes.open_scenes(
            config.world, self.run, pictures.album, split, config.num_scenes, config.seed
        )
        rng = np.random.default_rng((config.seed, 2, len(tested.scenes)))
        candidates = self._candidates(tested, rng)
        rolled = rollout_figures.roll_out(pictures, tested)
        written = text_figures.caption(pictures, tested)
        values = kept_figures.lists(
            rollout_figures.measure(pictures, tested, rolled, candidates, rng),
            rollout_figures.read(pictures, tested, rolled, self._readout),
            text_figures.measure_captions(pictures, tested, written),
        )
        if split == "held_out":
            self._keep_examples(tested, rolled, candidates)
        wanted = [pair[0] for pair in tested.pairs]
        files.write_json(self.stage_dir / f"{split}_{CAPTIONS}", {"wanted": wanted, **written})
        counts = {name: among.shape[1] for name, among in vars(candidates).items()}
        files.write_json(self.stage_dir / f"{split}_{CANDIDATES}", counts)
        return values

    def _keep_examples(
        self,
        tested: TestedScenes,
        rolled: Mapping[str, np.ndarray],
        candidates: rollout_figures.ImageCandidates,
    ) -> None:
        """Writes pictures of a few scenes, and those nearest to their rollouts, for the page."""
        pictures = self.pictures
        chosen = world_config.evenly_spaced(np.arange(len(tested.pairs)), _NUM_EXAMPLES)
        own: dict[str, list[int]] = {}
        for name, made in rolled.items():
            ordered = image_vectors.nearest(
                made[chosen], pictures.codes, candidates.random[chosen]
            )[:, :_NUM_NEAREST]
            pixels = np.stack([pictures.pixels(row) for row in ordered])
            files.write_array(self.stage_dir / f"nearest_{name}.npy", pixels)
            is_own = ordered == tested.numbers[chosen][:, None]
            own[name] = np.where(is_own.any(1), is_own.argmax(1), -1).tolist()
        files.write_array(self.stage_dir / "own.npy", pictures.pixels(tested.numbers[chosen]))
        captions = [tested.pairs[i][0] for i in chosen]
        kept = {"captions": captions, "own": own, "scenes": chosen.tolist()}
        files.write_json(self.stage_dir / EXAMPLES, kept)

    def stories(self) -> dict[str, Any]:
        """The sentences of stories of test classes."""
        scenes, rows = self._test(self.config.num_stories)
        return kept_figures.lists(text_figures.measure_stories(self.pictures, scenes, rows))

    def motion(self) -> dict[str, Any]:
        """The direction of clips of test classes."""
        scenes, rows = self._test(self.config.num_clips)
        rng = np.random.default_rng((self.config.seed, 3))
        return kept_figures.lists(text_figures.measure_motion(self.pictures, scenes, rows, rng))

    def collapse(self) -> dict[str, float]:
        """Variance between images of trained and of initial codes, and participation ratios."""
        pictures, numbers = self.pictures, self._readout_numbers[:1024]
        tokens = pictures.tokens(numbers)
        after = _raw(pictures.emu.model.graphdef, pictures.emu.model.params, tokens)
        initial = _initial(pictures.emu, self.config.seed)
        before = _raw(pictures.emu.model.graphdef, initial, tokens)
        codes = pictures.codes[numbers]
        return {
            "variance": image_vectors.variance(codes),
            "variance_to_initial": image_vectors.variance(after)
            / max(image_vectors.variance(before), 1e-12),
            "participation_ratio": image_vectors.participation_ratio(codes),
            "initial_participation_ratio": image_vectors.participation_ratio(
                (before - before.mean(0)) / (before.std(0) + 1e-3)
            ),
        }

    @functools.cached_property
    def _readout_numbers(self) -> np.ndarray:
        """Training pictures, at equal distances."""
        source = self.config.world.scenes("train", *world_config.SEEN)
        rows = world_config.sample_rows(source, self.config.num_readout, self.config.seed)
        album = self.pictures.album
        pairs = [training_documents.scene_pair(album, source, int(row)) for row in rows]
        return np.random.default_rng(0).permutation(np.array([pair[1] for pair in pairs]))

    @functools.cached_property
    def _readout(self) -> image_vectors.LinearReadout:
        pictures, numbers = self.pictures, self._readout_numbers
        return image_vectors.LinearReadout.fit(pictures.codes[numbers], pictures.pixels(numbers))

    def _candidates(
        self, tested: TestedScenes, rng: np.random.Generator
    ) -> rollout_figures.ImageCandidates:
        count, album = self.config.num_candidates, self.pictures.album
        return rollout_figures.ImageCandidates(
            tested_scenes.random_candidates(tested, count, rng),
            tested_scenes.own_candidates(album, tested, self.config.world.class_share),
            tested_scenes.same_candidates(album, tested, count, rng),
        )

    def _test(self, count: int) -> tuple[Scenes, list[int]]:
        scenes = self.config.world.scenes("test", *world_config.TEST)
        return scenes, world_config.sample_rows(scenes, count, self.config.seed).tolist()


def _raw(graphdef: nnx.GraphDef, params: Any, seen: np.ndarray) -> np.ndarray:
    """Codes before they are standardised, float32 [B, N, R]."""
    if "code_statistics" in params:
        neutral = {"mean": np.float32(0), "std": np.float32(1)}
        own = params["code_statistics"]
        own = {name: np.full_like(leaf, neutral[name]) for name, leaf in own.items()}
        params = {**params, "code_statistics": own}
    loaded = frozen.LoadedModel(graphdef, params)
    if "tower" in params:
        see = loaded.compile("see")
        seen = frozen.in_batches(lambda part: see(part / np.float32(255)), seen, 64)
    return frozen.in_batches(loaded.compile("encode"), seen, 256).astype(np.float32)


def _initial(emu: saved_emu.LoadedEmu, seed: int) -> Any:
    """The parameters before training, with what was fitted to the tower's tokens before it."""
    make = functools.partial(saved_emu.make_model, emu.config, seed)
    params = jax.device_get(param_trees.init_params(make, sharding.make_mesh()))
    fitted = ("vision_statistics", "components", "tower")
    return params | {name: emu.model.params[name] for name in fitted if name in params}
