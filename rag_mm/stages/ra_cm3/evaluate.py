"""Stage `evaluation`: metrics of the generated images and captions, with confidence intervals."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import code_grids, files, run_folder
from rag_mm.eval import (
    breakdown,
    cider,
    kernel_distance,
    likelihood,
    over_reliance,
    scene_accuracy,
    statistics,
)
from rag_mm.stages.ra_cm3 import generate_samples
from rag_mm.stages.shared import build_memory, coded_corpus, find_neighbors, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import emoji_scenes, scene_facts

INPUTS = (*generate_samples.INPUTS, "generation")
# Differences to report, paired by test document: (figure, variant, variant to subtract).
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
    """Has no settings of its own: the config of `generation` decides what is measured.

    Attributes:
        seed: unused.
        world: world of the test documents.
        generation: the config of the stage `generation`.
    """

    seed: int
    world: world_config.EmojiWorld
    generation: generate_samples.GenerationStageConfig


def run(
    config: EvaluationStageConfig, run: run_folder.Run, stage_dir: epath.Path
) -> dict[str, Any]:
    """Measures all variants of all splits.

    Writes `per_document.json`: {split: {variant: {figure: one value per test document}}}.

    Returns:
        Figures of held-out classes under `decoder`, `control` (the model without retrieval) and `baselines`;
        figures of seen classes under the key `seen` of each.
    """
    context = generate_samples.open_eval_context(config.generation, run)
    folder = run.finished_stage("generation")
    measured = {split: _measure(config, context, run, folder, split) for split in context.tests}
    values = {
        split: {
            name: {k: v.tolist() for k, v in (figures | split_figures.copied.get(name, {})).items()}
            for name, figures in split_figures.values.items()
        }
        for split, split_figures in measured.items()
    }
    files.write_json(stage_dir / PER_DOCUMENT, values)
    metrics, seen = (_arrange(measured[split]) for split in ("held_out", "seen"))
    for owner in metrics:
        metrics[owner]["seen"] = seen[owner]
    return metrics


@dataclasses.dataclass(frozen=True, eq=False)
class SplitFigures:
    """The figures of one split.

    Attributes:
        summary: {variant: {figure: value with its interval}}.
        values: {variant: {figure: [Q], one value per test document}}.
        copied: {variant: {figure: [Q]}}, what images have from their documents (`eval.over_reliance`).
        groups: {division: [Q], the group of each test document}, for figures by group.
    """

    summary: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    values: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    copied: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def _measure(
    config: EvaluationStageConfig,
    context: generate_samples.EvalContext,
    run: run_folder.Run,
    folder: epath.Path,
    split: str,
) -> SplitFigures:
    test = context.tests[split]
    measured = SplitFigures(groups=_groups(config, test))
    scenes = list(zip(test.facts, test.levels, strict=True))
    grids = context.image_tokenizer.grids
    art = np.stack(
        [code_grids.mask_of_pixels(emoji_scenes.entity_mask(*scene), grids) for scene in scenes]
    )

    def score_images(
        variant: str, images: np.ndarray, expected: list[emoji_scenes.Facts] | None = None
    ) -> list[emoji_scenes.Facts]:
        facts = scene_facts.read(images, test.levels)
        outcomes = scene_accuracy.outcomes(facts, expected or test.facts, test.levels[0])
        measured.summary[variant] = scene_accuracy.accuracies(outcomes)
        measured.values[variant] = {name: hits.astype(float) for name, hits in outcomes.items()}
        return facts

    memory_facts = find_neighbors.memory_facts(config.world)
    real_features = context.encoder.encode_image(test.images)
    for variant in test.variants:
        codes = files.read_array(folder / f"{split}_{variant.name}_codes.npy")
        images = context.image_tokenizer.decode(codes)
        facts = score_images(variant.name, images, variant.expected)
        summary, values = measured.summary[variant.name], measured.values[variant.name]
        features = context.encoder.encode_image(images)
        summary["kernel_distance"] = kernel_distance.kernel_distance(features, real_features)
        nll, is_top1 = likelihood.score_codes(variant.model, test.mains, variant.by_text)
        summary |= scene_accuracy.nll_summary(nll, art)
        values["art_nll"] = scene_accuracy.per_document(nll, art)
        values["art_top1"] = scene_accuracy.per_document(is_top1, art)
        summary["art_top1"] = statistics.mean(values["art_top1"])
        if variant.by_image is not None:
            path = folder / f"{split}_{variant.name}_captions.json"
            captions = files.read_object(path, captions=list)["captions"]
            values["cider"] = cider.cider(captions, [[text] for text in test.captions])
            summary["cider"] = statistics.mean(values["cider"])
        if count := _num_docs(variant.name):
            copied = _copied(context, test, memory_facts, count, facts, codes)
            summary |= over_reliance.accuracies(copied)
            measured.copied[variant.name] = over_reliance.per_document(copied)
    score_images("hit_itself", _best_hits(run, test))
    score_images("oracle_paste", _pasted(memory_facts, test))
    return measured


def _num_docs(variant: str) -> int:
    """How many retrieved documents a variant reads, `docsK`; 0 for the others."""
    count = variant.removeprefix("docs")
    return int(count) if variant.startswith("docs") and count.isdigit() else 0


def _copied(
    context: generate_samples.EvalContext,
    test: generate_samples.TestSet,
    memory_facts: list[emoji_scenes.Facts],
    count: int,
    read: list[emoji_scenes.Facts],
    codes: np.ndarray,
) -> dict[str, over_reliance.Copied]:
    """What images of `codes` have from the first `count` documents that were retrieved for them."""
    rows = [[int(row) for row in hits[:count] if row >= 0] for hits in test.hits]
    return over_reliance.measure(
        read,
        test.facts,
        [[memory_facts[row] for row in each] for each in rows],
        test.levels[0],
        codes,
        [[context.memory[row].codes for row in each] for each in rows],
    )


def _groups(config: EvaluationStageConfig, test: generate_samples.TestSet) -> dict[str, list[str]]:
    """Groups by level, by number of entities, and by number of training scenes of the class."""
    trained = config.world.scenes("train", *world_config.SEEN).class_ids
    groups = {
        "level": [level.name for level in test.levels],
        "num_entities": [str(len(facts.entities)) for facts in test.facts],
        "training_scenes": [str(int((trained == class_id).sum())) for class_id in test.class_ids],
    }
    return {name: labels for name, labels in groups.items() if len(set(labels)) > 1}


def _pasted(memory_facts: list[emoji_scenes.Facts], test: generate_samples.TestSet) -> np.ndarray:
    """The hits' entities at the places and on the background of the captions, as if copied perfectly."""

    def paste(facts: emoji_scenes.Facts, level: emoji_scenes.Level, hits: np.ndarray) -> np.ndarray:
        class_ids = [e.class_id for hit in hits if hit >= 0 for e in memory_facts[hit].entities]
        pasted = [
            dataclasses.replace(entity, class_id=class_id)
            for entity, class_id in zip(facts.entities, class_ids, strict=False)
        ]
        return emoji_scenes.render(dataclasses.replace(facts, entities=tuple(pasted)), level)

    queries = zip(test.facts, test.levels, test.hits, strict=True)
    return np.stack([paste(*query) for query in queries])


def _best_hits(run: run_folder.Run, test: generate_samples.TestSet) -> np.ndarray:
    """The images of the best hits, uint8 [Q, H, W, 3]; black for queries without a hit."""
    memory = build_memory.open_memory(run)
    black = np.zeros_like(test.images[0])
    best = test.hits[:, 0]
    return np.stack([coded_corpus.memory_image(memory, int(i)) if i >= 0 else black for i in best])


def _arrange(measured: SplitFigures) -> dict[str, Any]:
    """The metrics by owner: decoder.FIGURE.docsK, control.FIGURE and baselines.VARIANT.FIGURE."""
    summary, values = measured.summary, measured.values
    decoder: dict[str, Any] = {}
    for variant, figures in summary.items():
        if variant.startswith("docs"):
            for figure, value in figures.items():
                decoder.setdefault(figure, {})[variant] = value
    decoder["paired"] = breakdown.paired(values, PAIRS)
    for division, names in measured.groups.items():
        decoder[f"by_{division}"] = breakdown.by_group(values, names, PAIRS)
    models = ("control", *decoder["joint_accuracy"])
    baselines = {name: figures for name, figures in summary.items() if name not in models}
    return {"decoder": decoder, "control": summary["control"], "baselines": baselines}
