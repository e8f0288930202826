"""Stage `evaluation`: everything the run claims, as figures with intervals, held-out classes first."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.eval import breakdown, cider, kernel_distance, likelihood, scene_accuracy, statistics
from rag_mm.stages.ra_cm3 import generate_samples
from rag_mm.stages.shared import build_memory, coded_corpus, find_neighbors, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import emoji_scenes, scene_facts

INPUTS = (*generate_samples.INPUTS, "generation")
PATCH = 4  # pixels a side that one code of a scene covers
# Differences that the claims rest on, paired by test document: (figure, variant, against).
PAIRS = (
    ("art_nll", "docs1", "docs0"),
    ("art_nll", "docs2", "docs1"),
    ("art_nll", "docs1", "control"),
    ("art_nll", "docs2", "random_documents"),
    ("joint", "docs2", "docs0"),
    ("joint", "docs2", "control"),
    ("joint", "docs2", "hit_itself"),
    ("joint", "docs2", "random_documents"),
    ("joint", "docs2", "held_out_removed"),
    ("joint", "held_out_removed", "docs0"),
    ("cider", "docs2", "docs0"),
    ("cider", "docs2", "control"),
)


@dataclasses.dataclass(frozen=True)
class EvaluationStageConfig:
    """What is measured follows from what `generation` generated.

    Attributes:
        seed: of nothing here.
        world: where the test documents come from.
        generation: the config of that stage.
    """

    seed: int
    world: world_config.EmojiWorld
    generation: generate_samples.GenerationStageConfig


def run(
    config: EvaluationStageConfig, run: run_folder.Run, stage_dir: epath.Path
) -> dict[str, Any]:
    """Measures; figures of the decoder, the control and the baselines come under their own names.

    Writes `per_document.json`: {split: {variant: {figure: one value a test document}}}.
    """
    bench = generate_samples.open_eval_context(config.generation, run)
    drawn = run.finished_stage("generation")
    measured = {split: _measure(config, bench, run, drawn, split) for split in bench.tests}
    values = {
        split: {
            name: {k: v.tolist() for k, v in figures.items()}
            for name, figures in found.values.items()
        }
        for split, found in measured.items()
    }
    files.write_json(stage_dir / PER_DOCUMENT, values)
    metrics, seen = (_arrange(measured[split]) for split in ("held_out", "seen"))
    for owner in metrics:
        metrics[owner]["seen"] = seen[owner]
    return metrics


@dataclasses.dataclass(frozen=True, eq=False)
class SplitFigures:
    """Figures of one split by variant, and the values [Q] by test document that they are means of.

    `groups` names, for each way of dividing the test documents, the group of each.
    """

    summary: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    values: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def _measure(
    config: EvaluationStageConfig,
    bench: generate_samples.EvalContext,
    run: run_folder.Run,
    drawn: epath.Path,
    split: str,
) -> SplitFigures:
    test = bench.tests[split]
    measured = SplitFigures(groups=_groups(config, test))
    scenes = list(zip(test.facts, test.levels, strict=True))
    art = np.stack([emoji_scenes.entity_mask(*scene, PATCH).ravel() for scene in scenes])

    def judge(
        variant: str, pictures: np.ndarray, wanted: list[emoji_scenes.Facts] | None = None
    ) -> None:
        read = scene_facts.read(pictures, test.levels)
        right = scene_accuracy.outcomes(read, wanted or test.facts, test.levels[0])
        measured.summary[variant] = scene_accuracy.accuracies(right)
        measured.values[variant] = {name: found.astype(float) for name, found in right.items()}

    real_features = bench.encoder.encode_image(test.pictures)
    for variant in test.variants:
        pictures = bench.image_tokenizer.decode(
            files.read_array(drawn / f"{split}_{variant.name}_codes.npy")
        )
        judge(variant.name, pictures, variant.wanted)
        summary, values = measured.summary[variant.name], measured.values[variant.name]
        features = bench.encoder.encode_image(pictures)
        summary["kernel_distance"] = kernel_distance.kernel_distance(features, real_features)
        nll, is_top1 = likelihood.score_codes(variant.model, test.mains, variant.by_text)
        summary |= scene_accuracy.nll_summary(nll, art)
        values["art_nll"] = scene_accuracy.per_document(nll, art)
        values["art_top1"] = scene_accuracy.per_document(is_top1, art)
        summary["art_top1"] = statistics.mean(values["art_top1"])
        if variant.by_image is not None:
            written = files.read_json(drawn / f"{split}_{variant.name}_captions.json")["captions"]
            values["cider"] = cider.cider(written, [[text] for text in test.captions])
            summary["cider"] = statistics.mean(values["cider"])
    judge("hit_itself", _hits(run, test))
    judge("oracle_paste", _pasted(config, test))
    return measured


def _groups(config: EvaluationStageConfig, test: generate_samples.TestSet) -> dict[str, list[str]]:
    """By level, by how many entities are asked for, by how many training scenes show the class."""
    trained = config.world.scenes("train", *world_config.SEEN).class_ids
    groups = {
        "level": [level.name for level in test.levels],
        "num_entities": [str(len(facts.entities)) for facts in test.facts],
        "training_scenes": [str(int((trained == class_id).sum())) for class_id in test.class_ids],
    }
    return {name: each for name, each in groups.items() if len(set(each)) > 1}


def _pasted(config: EvaluationStageConfig, test: generate_samples.TestSet) -> np.ndarray:
    """The art of the best hits where and on what was asked: what copying without a fault would draw."""
    shown = find_neighbors.memory_facts(config.world)

    def paste(
        wanted: emoji_scenes.Facts, level: emoji_scenes.Level, hits: np.ndarray
    ) -> np.ndarray:
        brought = [entity.class_id for hit in hits if hit >= 0 for entity in shown[hit].entities]
        pasted = [
            dataclasses.replace(entity, class_id=class_id)
            for entity, class_id in zip(wanted.entities, brought, strict=False)
        ]
        facts = dataclasses.replace(wanted, entities=tuple(pasted))
        return emoji_scenes.render(facts, level)

    each = zip(test.facts, test.levels, test.hits, strict=True)
    return np.stack([paste(*one) for one in each])


def _hits(run: run_folder.Run, test: generate_samples.TestSet) -> np.ndarray:
    """The best retrieved document's own picture, uint8 [Q, H, W, 3]; black where nothing was found."""
    memory = build_memory.open_memory(run)
    black = np.zeros_like(test.pictures[0])
    found = [coded_corpus.memory_image(memory, int(i)) if i >= 0 else black for i in test.hits[:, 0]]
    return np.stack(found)


def _arrange(measured: SplitFigures) -> dict[str, Any]:
    """{variant: {figure: value}} turned into decoder.FIGURE.docsK, control.FIGURE, baselines.NAME.FIGURE."""
    summary, values = measured.summary, measured.values
    decoder: dict[str, Any] = {}
    for variant, figures in summary.items():
        if variant.startswith("docs"):
            for figure, value in figures.items():
                decoder.setdefault(figure, {})[variant] = value
    decoder["paired"] = breakdown.paired(values, PAIRS)
    for division, names in measured.groups.items():
        decoder[f"by_{division}"] = breakdown.by_group(values, names, PAIRS)
    owned = ("control", *decoder["joint_accuracy"])
    baselines = {name: figures for name, figures in summary.items() if name not in owned}
    return {"decoder": decoder, "control": summary["control"], "baselines": baselines}
