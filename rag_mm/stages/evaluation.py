"""Stage `evaluation`: everything the run claims, as figures with intervals, held-out classes first."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files
from rag_mm.core import run as run_lib
from rag_mm.eval import caption as caption_metrics
from rag_mm.eval import kernel_distance, likelihood, statistics
from rag_mm.eval import scenes as scene_metrics
from rag_mm.stages import corpus as corpus_lib
from rag_mm.stages import generation, neighbors
from rag_mm.stages import memory as memory_stage
from rag_mm.stages import world as world_lib
from rag_mm.worlds.emoji import facts as facts_lib
from rag_mm.worlds.emoji import scenes as scene_lib

INPUTS = (*generation.INPUTS, "generation")
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
    ("cider", "docs2", "docs0"),
    ("cider", "docs2", "control"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured follows from what `generation` drew."""

    seed: int
    world: world_lib.World
    generation: generation.Config


def run(config: Config, run: run_lib.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Measures; figures of the decoder, the control and the baselines come under their own names."""
    bench = generation.open_bench(config.generation, run)
    drawn_dir = run.finished_stage("generation")
    measured = {split: _measure(config, bench, run, drawn_dir, split) for split in bench.tests}
    metrics = _arrange(measured["held_out"])
    seen = _arrange(measured["seen"])
    for owner in metrics:
        metrics[owner]["seen"] = seen[owner]
    return metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Figures of one split by variant, and per-document values [Q] for paired differences."""

    summary: dict[str, dict[str, Any]]
    per_document: dict[str, dict[str, np.ndarray]]


def _measure(
    config: Config, bench: generation.Bench, run: run_lib.Run, drawn: epath.Path, split: str
) -> Measured:
    test = bench.tests[split]
    level, names = config.world.geometry, neighbors.TEST_SPLITS[split]
    source = config.world.scenes("test", *names)
    asked = [source.facts(int(row)) for row in test.scene_rows]
    art = np.stack([scene_lib.entity_mask(shown, level, PATCH).ravel() for shown in asked])
    scorer = facts_lib.Scorer(level)
    summary: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, np.ndarray]] = {}

    def judge(variant: str, pictures: np.ndarray) -> None:
        right = scene_metrics.outcomes(scorer.read(pictures), asked, level)
        summary.setdefault(variant, {}).update(scene_metrics.accuracies(right))
        values.setdefault(variant, {})["joint"] = right["joint"].astype(float)

    real_features = bench.encoder.encode_image(test.pictures)
    for variant, model, count in bench.variants():
        pictures = bench.codec.decode(files.read_array(drawn / f"{split}_{variant}_codes.npy"))
        judge(variant, pictures)
        features = bench.encoder.encode_image(pictures)
        summary[variant]["kernel_distance"] = kernel_distance.kernel_distance(
            features, real_features
        )
        nll = likelihood.code_nll(model, test.mains, bench.docs(test.docs_by_text, count))
        summary[variant] |= scene_metrics.nll_summary(nll, art)
        values[variant]["art_nll"] = scene_metrics.document_nll(nll, art)
        written = files.read_json(drawn / f"{split}_{variant}_captions.json")["captions"]
        scores = caption_metrics.cider(written, [[text] for text in test.captions])
        summary[variant]["cider"] = statistics.mean(scores)
        values[variant]["cider"] = scores
    judge("hit_itself", _hits(config, run, test))
    codes = files.read_array(drawn / f"{split}_random_documents_codes.npy")
    judge("random_documents", bench.codec.decode(codes))
    most = bench.decoder.layout.max_docs
    nll = likelihood.code_nll(bench.decoder, test.mains, bench.docs(test.random_docs, most))
    summary["random_documents"] |= scene_metrics.nll_summary(nll, art)
    values["random_documents"]["art_nll"] = scene_metrics.document_nll(nll, art)
    return Measured(summary, values)


def _hits(config: Config, run: run_lib.Run, test: generation.TestSet) -> np.ndarray:
    """The best retrieved document's own picture, uint8 [Q, H, W, 3]; black where nothing was found."""
    memory = memory_stage.open_memory(run)
    black = np.zeros_like(test.pictures[0])
    found = [
        corpus_lib.picture(memory, int(i)) if i >= 0 else black for i in test.docs_by_text[:, 0]
    ]
    return np.stack(found)


def _arrange(measured: Measured) -> dict[str, Any]:
    """{variant: {figure: value}} turned into decoder.FIGURE.docsK, control.FIGURE, baselines.NAME.FIGURE."""
    summary, values = measured.summary, measured.per_document
    decoder: dict[str, Any] = {}
    for variant, figures in summary.items():
        if variant.startswith("docs"):
            for figure, value in figures.items():
                decoder.setdefault(figure, {})[variant] = value
    decoder["paired"] = {
        f"{figure}_{ours}_minus_{theirs}": statistics.paired_difference(
            values[ours][figure], values[theirs][figure]
        )
        for figure, ours, theirs in PAIRS
        if ours in values and theirs in values
    }
    baselines = {name: summary[name] for name in ("hit_itself", "random_documents")}
    return {"decoder": decoder, "control": summary["control"], "baselines": baselines}
