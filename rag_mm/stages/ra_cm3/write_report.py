"""Stage `report`: writes the HTML report of a run, and its images as PNG files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import rag_mm
from rag_mm import report
from rag_mm.core import checks, costs, files, run_folder
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.report import logs, reference, selection
from rag_mm.stages.ra_cm3 import generate_samples, latency
from rag_mm.stages.shared import build_memory, coded_corpus, train_retriever, world_config
from rag_mm.worlds.emoji import art, scene_facts

PAGE = "report.html"
COSTS = "quickstart"  # Key in metrics.json of the costs of the whole run.
INPUTS = (*generate_samples.INPUTS, "generation", "evaluation")


@dataclasses.dataclass(frozen=True)
class ReportStageConfig:
    """Contents of the page; `report.selection` chooses the test documents.

    Attributes:
        seed: seed shown on the page.
        world: world of the test documents.
        generation: the config of the stage `generation`.
        num_flags: number of held-out flags on the first screen (fewer if there are fewer).
        num_others: number of other held-out entities on the first screen.
        num_rows: number of rows in each other panel: those of the first screen, then further entities.
        reference: file written by `report.reference` with the bands behind the training curves; "" for none.
        title: title of the page.
        command: command shown as the one that made the page.
        notes: sentences shown below the title.
    """

    seed: int
    world: world_config.EmojiWorld
    generation: generate_samples.GenerationStageConfig
    num_flags: int = 4
    num_others: int = 6
    num_rows: int = 12
    reference: str = ""
    title: str = "rag_mm quickstart"
    command: str = "make quickstart"
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        checks.at_least(self, 0, "num_flags", "num_others")
        checks.at_least(self, 1, "num_rows")
        reference.load(self.reference)  # Fails before training if the file is damaged.


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedExamples:
    """The test documents that the page shows, one per class.

    Attributes:
        indices: int64 [R], into the held-out test set: those of the first screen, then further ones.
        num_story: number of documents on the first screen.
        num_flags: number of flags among these.
    """

    indices: np.ndarray
    num_story: int
    num_flags: int

    @property
    def rule(self) -> str:
        """How the documents of the first screen were chosen, as a sentence."""
        return selection.rule(self.num_flags, self.num_story - self.num_flags)


def run(config: ReportStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Writes the page's images to `figures/`; `finish` writes the page when all costs are known."""
    context = generate_samples.open_eval_context(config.generation, run)
    report.save_figures(gather_data(config, run, context, {}), stage_dir / "figures")
    return {}


def finish(config: ReportStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Adds up the costs of the stages, measures speed, and writes `report.html` next to metrics.json."""
    context = generate_samples.open_eval_context(config.generation, run)
    run.save_costs(COSTS, stages, **latency.measure(config.generation, run, context))
    page = run.workdir / PAGE
    data = gather_data(config, run, context, run.metrics)
    files.write_atomic(page, report.render_report(data).encode())
    return page


def gather_data(
    config: ReportStageConfig,
    run: run_folder.Run,
    context: generate_samples.EvalContext,
    metrics: dict[str, Any],
) -> report.ReportData:
    """The contents of the page."""
    memory = build_memory.open_memory(run)
    selected = select_examples(config, context.tests["held_out"])
    indices = selected.indices
    generations = list(_generations(context, run, memory, indices))
    bands = reference.load(config.reference)
    stage_costs = metrics.get(run_folder.MACHINE, {})
    return report.ReportData(
        title=config.title,
        command=config.command,
        seed=config.seed,
        version=rag_mm.__version__,
        metrics={k: v for k, v in metrics.items() if k != run_folder.MACHINE},
        config=run.config,
        what_was_seen=what_was_seen(retriever_splits(run.config)),
        setting=_setting(config, len(memory), run.config, metrics.get("neighbors", {})),
        notes=config.notes,
        machine=_machine(),
        stage_seconds={
            stage: stage_costs[stage]["wall_seconds"]
            for stage in run.config["stages"]
            if stage in stage_costs
        },
        story=generations[: selected.num_story],
        choice=selected.rule,
        reconstructions=_reconstructions(context, indices),
        retrievals=list(_retrievals(context, memory, indices)),
        generations=generations,
        captions=_captions(context, run, indices),
        curves=list(logs.read_curves(run.workdir, bands.bands if bands else {})),
        band_note=bands.note if bands else "",
    )


def select_examples(config: ReportStageConfig, test: generate_samples.TestSet) -> SelectedExamples:
    """Chooses one document per class, the same ones for all panels."""
    class_ids = test.class_ids
    is_flag = art.load_art().is_flag[class_ids]
    story = selection.choose(class_ids, is_flag, config.num_flags, config.num_others)
    further = np.setdiff1d(selection.first_of_each_class(class_ids), story)
    indices = np.concatenate([story, further[: max(0, config.num_rows - len(story))]])
    return SelectedExamples(indices, len(story), int(is_flag[story].sum()))


def _machine() -> str:
    machine = costs.machine()
    versions = machine["versions"]
    cores = f"{machine['processor']}, {machine['cores']} cores"
    return f"{cores}, Python {machine['python']}, jax {versions['jax']}, flax {versions['flax']}"


def retriever_splits(run_config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The splits of classes that a run's retriever was trained on; None if it was given."""
    retriever = run_config.get("retriever", {})
    if retriever.get("folder") is not None:
        return None
    return tuple(retriever.get("splits", train_retriever.RetrieverStageConfig.splits))


def what_was_seen(splits: Sequence[str] | None) -> str:
    """The sentence that says whether a retriever trained on `splits` has seen the held-out classes."""
    if splits is None:
        return (
            "The retriever was given, not trained here: whether it has seen the held-out entities is not "
            "known; the decoder has not."
        )
    if set(splits) & {*world_config.HELD_OUT, *world_config.TUNE, *world_config.TEST}:
        return (
            "The retriever has seen other images of the held-out entities, with captions, as a public CLIP "
            "would have; the decoder and the image tokenizer have not."
        )
    return "No model has seen the held-out entities, not even the retriever."


def _setting(
    config: ReportStageConfig,
    num_rows: int,
    run_config: Mapping[str, Any],
    neighbors: Mapping[str, Any],
) -> list[tuple[str, str]]:
    world, splits = config.world, retriever_splits(run_config)
    seen = "not known, it was given" if splits is None else ", ".join(splits)
    rows = [
        ("Level of the scenes", ", ".join(world.levels)),
        ("Seed of the world", f"{world.seed}"),
        ("Classes seen in training", f"{len(world.classes(*world_config.SEEN)):,}"),
        ("Held-out classes that are measured", f"{len(world.classes(*world_config.TEST)):,}"),
        ("Held-out classes for checks", f"{len(world.classes(*world_config.TUNE)):,}"),
        ("Classes the retriever saw", seen),
        ("Documents in the memory", f"{num_rows:,}"),
    ]
    decoder = run_config.get("decoder", {})
    if decoder.get("model", {}).get("induction_init"):
        rows.append(("Attention heads at the start", _wired_heads(decoder)))
    if "max_equal_codes" in neighbors:  # Not yet while the stage itself runs.
        rows.append(("Documents skipped as redundant", _redundancy(neighbors)))
    return rows


def _wired_heads(decoder: Mapping[str, Any]) -> str:
    """What `induction_init` does to the heads with lags."""
    num_heads = decoder["model"]["num_heads"]
    lags = decoder.get("look_back") or decoder["model"].get("smear_lags", ())
    num_wired = sum(bool(entry) for entry in lags)
    return (
        f"{num_wired or num_heads} of {num_heads} in each layer begin as induction heads: "
        "before any training they find what resembles the last codes and copy what followed it"
    )


def _redundancy(neighbors: Mapping[str, Any]) -> str:
    """The bounds of the retrieval, and how alike the two documents of a training caption are."""
    bounds = []
    if neighbors["max_similarity"] is not None:
        bounds.append(f"cosine above {neighbors['max_similarity']:g}")
    if neighbors["max_equal_codes"] < 1:
        bounds.append(f"more than {100 * neighbors['max_equal_codes']:g} % equal codes")
    found = [
        f"{label} {neighbors[key]:.3f}"
        for key, label in (
            ("median_similarity_of_two", "cosine"),
            ("median_equal_codes_of_two", "share of equal codes"),
        )
        if key in neighbors
    ]
    medians = f"; median over the two documents of a caption: {', '.join(found)}" if found else ""
    return f"{' or '.join(bounds) or 'none'}{medians}"


def _reconstructions(
    context: generate_samples.EvalContext, indices: np.ndarray
) -> list[report.Reconstruction]:
    test = context.tests["held_out"]
    decoded = context.image_tokenizer.decode(np.stack([test.mains[i].codes for i in indices]))
    return [
        report.Reconstruction(test.captions[i], test.images[i], reconstruction)
        for i, reconstruction in zip(indices, decoded, strict=True)
    ]


def _retrievals(
    context: generate_samples.EvalContext, memory: Memory, indices: np.ndarray
) -> Iterator[report.Retrieval]:
    test = context.tests["held_out"]
    queries = context.encoder.encode_text([test.captions[i] for i in indices])
    vectors = memory.embeddings("mixed")
    for i, query in zip(indices, queries, strict=True):
        hits = []
        for row in test.hits[i][test.hits[i] >= 0]:
            document = memory.document(int(row))
            pixels = coded_corpus.memory_image(memory, int(row))
            hits.append(report.Hit(document.text, pixels, float(query @ vectors[row])))
        yield report.Retrieval(test.captions[i], hits)


def _generations(
    context: generate_samples.EvalContext,
    run: run_folder.Run,
    memory: Memory,
    indices: np.ndarray,
) -> Iterator[report.Generation]:
    test, folder = context.tests["held_out"], run.finished_stage("generation")
    expected, levels = [test.facts[i] for i in indices], [test.levels[i] for i in indices]
    images, outcomes = {}, {}
    for name in (v.name for v in test.variants):
        codes = files.read_array(folder / f"held_out_{name}_codes.npy")[indices]
        images[name] = context.image_tokenizer.decode(codes)
        facts = scene_facts.read(images[name], levels)
        outcomes[name] = [
            scene_facts.compare(*scene) for scene in zip(facts, expected, levels, strict=True)
        ]
    for n, i in enumerate(indices):
        yield report.Generation(
            test.captions[i],
            test.images[i],
            [coded_corpus.memory_image(memory, int(row)) for row in test.hits[i] if row >= 0],
            {name: generated[n] for name, generated in images.items()},
            {name: verdicts[n] for name, verdicts in outcomes.items()},
        )


def _captions(
    context: generate_samples.EvalContext, run: run_folder.Run, indices: np.ndarray
) -> list[report.CaptionExample]:
    test, folder = context.tests["held_out"], run.finished_stage("generation")
    captions = {
        name: files.read_object(folder / f"held_out_{name}_captions.json", captions=list)[
            "captions"
        ]
        for name in (v.name for v in test.variants if v.by_image is not None)
    }
    return [
        report.CaptionExample(
            test.images[i], test.captions[i], {name: texts[i] for name, texts in captions.items()}
        )
        for i in indices
    ]
