"""Stage `visual_figures`: measures what the visual decoder draws on test scenes; finished parts are kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder
from rag_mm.eval import breakdown, statistics
from rag_mm.stages.emu import (
    rollout_figures,
    saved_emu,
    saved_visual,
    tested_scenes,
    visual_prompts,
)
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.saved_visual import LoadedVisualDecoder
from rag_mm.stages.emu.tested_scenes import EncodedPictures
from rag_mm.stages.emu.visual_prompts import FIRST_IMAGE, SENTENCE, STORY, WantedImages
from rag_mm.stages.shared import train_retriever, world_config
from rag_mm.stages.stage import PER_DOCUMENT

INPUTS = ("retriever", "memory", "neighbors", "emu", "visual_decoder")
CONTROL = "visual_control"
EXAMPLES, STORIES, BLENDS = "examples", "stories", "blends"
# Images drawn from the codes of the encoder, and from the rollout of the empty prompt.
ENCODED, NULL = "encoded", "null"
_NUM_EXAMPLES = 12
_SHARES = ("entity", "place", "color", "joint")
# What the decoder that is trained on the encoder's codes draws from.
_OF_CONTROL = ("none", "oracle", ENCODED)


@dataclasses.dataclass(frozen=True)
class VisualFiguresStageConfig:
    """What a visual decoder is measured on.

    Attributes:
        seed: seed of oracle and wrong documents, and of the noise, which is the same for all variants.
        world: world of the documents.
        num_scenes: test scenes of test classes, and of seen classes, at most `neighbors.num_test`.
        num_stories: stories of test classes.
        guidances: weights of guidance that are compared, without documents; the first is the one that others
            are compared with.
        has_control: whether the stage `visual_control` is measured beside it.
    """

    seed: int
    world: world_config.EmojiWorld
    num_scenes: int = 192
    num_stories: int = 96
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    has_control: bool = True

    def __post_init__(self):
        checks.at_least(self, 2, "num_scenes", "num_stories")
        if not self.guidances or min(self.guidances) < 0:
            raise ValueError(f"guidances are {self.guidances}; give at least one, none below 0")


def inputs(config: VisualFiguresStageConfig) -> tuple[str, ...]:
    """The further stages that it reads with this config."""
    return (CONTROL,) if config.has_control else ()


def run(config: VisualFiguresStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Measures everything, and keeps the values of each scene in `per_document.json`.

    Returns:
        Of `held_out`, `seen` and `held_out_stories` the mean of each figure by variant, and `paired`
        differences of variants. `mse` is of pixels in 0..1.
    """
    context = _Measured(config, run, stage_dir)
    parts: dict[str, Callable[[], Mapping[str, Any]]] = {
        "held_out": functools.partial(context.scenes, "held_out"),
        "seen": functools.partial(context.scenes, "seen"),
        "held_out_stories": context.stories,
    }
    found: dict[str, Mapping[str, Any]] = {}
    with progress.track("visual_figures", len(parts)) as bar:
        for number, (name, make) in enumerate(parts.items(), 1):
            path = stage_dir / f"part_{name}.json"
            if not path.exists():
                files.write_json(path, make())
            found[name] = files.read_object(path)
            bar.update(number)
    files.write_json(stage_dir / PER_DOCUMENT, found)
    return {name: _summary(values, _pairs(config)) for name, values in found.items()}


def guidance_name(weight: float) -> str:
    """The variant of a weight, such as `guidance_1_5`; a dot would divide a path."""
    return f"guidance_{weight:g}".replace(".", "_")


def _pairs(config: VisualFiguresStageConfig) -> list[tuple[str, str, str]]:
    """(figure, ours, theirs) of differences paired by scene."""
    first, *rest = map(guidance_name, config.guidances)
    documents = [("mse", ours, "none") for ours in ("oracle", "retrieved", "wrong")]
    guided = [("mse", name, first) for name in rest]
    of_control = [
        (figure, name, f"control_{name}") for name in _OF_CONTROL for figure in ("mse", "place")
    ]
    story = [("mse", STORY, SENTENCE), ("joint", STORY, FIRST_IMAGE), ("mse", STORY, FIRST_IMAGE)]
    return [*documents, ("entity", "oracle", "none"), *guided, *of_control, *story]


def _summary(
    values: Mapping[str, Mapping[str, Any]], pairs: list[tuple[str, str, str]]
) -> dict[str, Any]:
    """Means by figure and variant with their intervals, and paired differences."""
    arrays = {
        variant: {name: np.array(each) for name, each in figures.items()}
        for variant, figures in values.items()
    }
    summary: dict[str, Any] = {}
    for variant, figures in arrays.items():
        for name, each in figures.items():
            mean = statistics.accuracy if name in _SHARES else statistics.mean
            summary.setdefault(name, {})[variant] = mean(each, name)
    return summary | {"paired": breakdown.paired(arrays, pairs)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """The models and pictures that several parts need; loaded when first asked for."""

    config: VisualFiguresStageConfig
    run: run_folder.Run
    stage_dir: epath.Path

    @functools.cached_property
    def pictures(self) -> EncodedPictures:
        emu = saved_emu.load(self.run.finished_stage("emu"))
        return EncodedPictures(Album(), train_retriever.load_encoder(self.run.workdir), emu)

    @functools.cached_property
    def decoder(self) -> LoadedVisualDecoder:
        return saved_visual.load(self.run.finished_stage("visual_decoder"))

    @functools.cached_property
    def control(self) -> LoadedVisualDecoder | None:
        if not self.config.has_control:
            return None
        return saved_visual.load(self.run.finished_stage(CONTROL))

    def scenes(self, split: str) -> dict[str, Any]:
        """What is drawn of the test scenes of a split; keeps pictures of held-out ones."""
        config, pictures = self.config, self.pictures
        tested = tested_scenes.open_scenes(
            config.world, self.run, pictures.album, split, config.num_scenes, config.seed
        )
        rolled = rollout_figures.roll_out(pictures, tested)
        codes = rolled | {ENCODED: pictures.codes[tested.numbers]}
        wanted = WantedImages(pictures.pixels(tested.numbers), tested.facts, tested.levels)
        drawn = self._draw_all(codes)
        if split == "held_out":
            chosen = world_config.evenly_spaced(np.arange(len(tested.pairs)), _NUM_EXAMPLES)
            shown = {
                name: drawn[name]
                for name in (*rolled, ENCODED, "control_none", NULL)
                if name in drawn
            }
            captions = [tested.pairs[i][0] for i in chosen]
            self._keep(
                EXAMPLES, {"original": wanted.pixels} | shown, chosen, {"captions": captions}
            )
            self._keep_blends(tested.numbers[chosen])
        return _lists(visual_prompts.judge_all(wanted, drawn))

    def _draw_all(self, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Images of each variant; the noise of a scene is the same in all of them."""
        seed, plain = self.config.seed, codes["none"]
        drawn = {name: self.decoder.draw(each, seed) for name, each in codes.items()}
        nothing = np.broadcast_to(self.decoder.null[None], plain.shape)
        drawn[NULL] = self.decoder.draw(nothing, seed, guidance=1.0)
        for weight in self.config.guidances:
            drawn[guidance_name(weight)] = self.decoder.draw(plain, seed, guidance=weight)
        if self.control is not None:
            for name in _OF_CONTROL:
                drawn[f"control_{name}"] = self.control.draw(codes[name], seed)
        return drawn

    def stories(self) -> dict[str, Any]:
        """The second image of stories: drawn after all before it, or after its sentence alone.

        The variant `first_image` is the first image as it is.
        """
        config, pictures = self.config, self.pictures
        scenes = config.world.scenes("test", *world_config.TEST)
        rows = world_config.sample_rows(scenes, config.num_stories, config.seed).tolist()
        stories = visual_prompts.open_stories(pictures, scenes, rows)
        vectors = pictures.vectors
        drawn = {
            name: self.decoder.draw(pictures.emu.roll_out(prompts, vectors), config.seed)
            for name, prompts in stories.prompts().items()
        }
        first = pictures.pixels(stories.first)
        chosen = world_config.evenly_spaced(np.arange(len(rows)), _NUM_EXAMPLES)
        shown = {FIRST_IMAGE: first, STORY: drawn[STORY], "original": stories.wanted.pixels}
        texts = [[part for part in stories.given[i] if isinstance(part, str)] for i in chosen]
        self._keep(STORIES, shown, chosen, {"texts": texts})
        return _lists(visual_prompts.judge_all(stories.wanted, drawn | {FIRST_IMAGE: first}))

    def _keep_blends(self, numbers: np.ndarray) -> None:
        """Draws pairs of images blended: what follows the two without a text."""
        pictures, pairs = self.pictures, visual_prompts.blends(numbers)
        drawn = self.decoder.draw(pictures.emu.roll_out(pairs, pictures.vectors), self.config.seed)
        first = pictures.pixels(numbers)
        shown = {"first": first, "second": np.roll(first, -1, axis=0), "blend": drawn}
        self._keep(BLENDS, shown, np.arange(len(numbers)), {})

    def _keep(
        self, name: str, images: dict[str, np.ndarray], chosen: np.ndarray, texts: dict[str, Any]
    ) -> None:
        """Writes a few images of each kind for the page, `NAME_KIND.npy`, and `NAME.json`."""
        for kind, each in images.items():
            files.write_array(self.stage_dir / f"{name}_{kind}.npy", each[chosen])
        files.write_json(self.stage_dir / f"{name}.json", {"kinds": list(images), **texts})


def _lists(values: rollout_figures.Values) -> dict[str, dict[str, list[float]]]:
    return {
        variant: {name: array.tolist() for name, array in figures.items()}
        for variant, figures in values.items()
    }
