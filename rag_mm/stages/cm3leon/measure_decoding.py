"""Stage `decoding`: compares ways of sampling image codes on scenes of held-out classes (CM3Leon, 3.2).

Guidance by null prompt, weight and temperature, contrastive decoding, re-ranking of candidates, and parallel
decoding. Each setting has its own files, so an interrupted stage resumes with the next one.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, progress, run_folder
from rag_mm.decode import tasks
from rag_mm.eval import scene_accuracy, statistics
from rag_mm.stages.cm3leon import decoding_settings, judge_decoding, rank_candidates
from rag_mm.stages.cm3leon.decoding_scenes import SPLIT, DecodingScenes, open_scenes
from rag_mm.stages.cm3leon.decoding_settings import DecodingSetting, DecodingStageConfig
from rag_mm.stages.stage import PER_DOCUMENT

INPUTS = ("tokenizer", "retriever", "memory", "neighbors", "decoder")
# {setting: {figure: [Q]}}, one value per test scene.
Values = dict[str, dict[str, np.ndarray]]


def run(config: DecodingStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Draws and scores the scenes with every setting.

    Writes for each `NAME_codes.npy`, int32 [Q, N], and `NAME.json`, its figures with one value per scene; and
    `per_document.json`, all figures.

    Returns:
        `num_scenes`; `settings`, the figures of each; `ranked`, those of re-ranking by what makes the
        candidates and how many there are; `claims`, see `judge_decoding`.

    Raises:
        UserError: an input is missing, or the decoder never saw a null prompt of the config.
    """
    scenes = open_scenes(config, run)
    made = decoding_settings.settings(config)
    with progress.track("decoding", total=len(made)) as bar:
        for done, setting in enumerate(made, start=1):
            _measure(config, scenes, setting, stage_dir)
            bar.update(done)
    values = {setting.name: read_values(stage_dir, setting.name) for setting in made}
    codes = {name: read_codes(stage_dir, name) for name in values}
    ranked = rank_candidates.rank(config, values)
    everything = values | ranked
    lists = {
        name: {figure: array.tolist() for figure, array in figures.items()}
        for name, figures in everything.items()
    }
    files.write_json(stage_dir / PER_DOCUMENT, {SPLIT: lists})
    return {
        "num_scenes": len(scenes.facts),
        "settings": {name: _summary(figures) for name, figures in values.items()},
        "ranked": {name: _summary(figures) for name, figures in ranked.items()},
        "claims": [
            dataclasses.asdict(claim) for claim in judge_decoding.claims(config, everything, codes)
        ],
    }


def read_values(stage_dir: epath.Path, name: str) -> dict[str, np.ndarray]:
    """The figures of a setting that the stage has written, one value per scene each."""
    content = files.read_object(stage_dir / f"{name}.json")
    return {figure: np.asarray(values, np.float64) for figure, values in content.items()}


def read_codes(stage_dir: epath.Path, name: str) -> np.ndarray:
    """The codes that a setting has drawn, int32 [Q, N]."""
    return files.read_array(stage_dir / f"{name}_codes.npy")


def _measure(
    config: DecodingStageConfig,
    scenes: DecodingScenes,
    setting: DecodingSetting,
    stage_dir: epath.Path,
) -> None:
    """Writes the files of one setting, unless an interrupted run has."""
    path = stage_dir / f"{setting.name}.json"
    if path.exists():
        return
    seeds = tasks.make_seeds(config.seed, len(scenes.texts), setting.candidate)
    drawn = scenes.draw(setting, seeds)
    values = scenes.score(drawn.codes)
    if setting.temperature == 1:
        # Codes are sampled from the distribution of their log-probability: an unbiased estimate.
        values["entropy"] = -drawn.log_probs.astype(np.float64) / drawn.codes.shape[1]
    if setting.decoding != tasks.SEQUENTIAL and drawn.passes is not None:
        values["passes"] = drawn.passes.astype(np.float64)
    files.write_array(stage_dir / f"{setting.name}_codes.npy", drawn.codes)
    lists = {figure: array.tolist() for figure, array in values.items()}
    files.write_atomic(path, files.canonical_json(lists).encode())


def _summary(figures: dict[str, np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Each figure's accuracy or mean over scenes, with its standard error."""
    summary = {}
    for name, values in figures.items():
        is_share = name in scene_accuracy.FACTS and np.isin(values, (0, 1)).all()
        described = statistics.accuracy(values) if is_share else statistics.mean(values)
        summary[name] = described | {"standard_error": statistics.standard_error(values)}
    return summary
