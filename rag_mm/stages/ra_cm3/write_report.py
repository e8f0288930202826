"""Stage `report`: one page a person looks at, and the same pictures as PNG files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import rag_mm
from rag_mm import report
from rag_mm.core import costs as clock
from rag_mm.core import files, run_folder
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.report import logs, reference, selection
from rag_mm.stages.ra_cm3 import generate_samples, latency
from rag_mm.stages.shared import build_memory, coded_corpus, train_retriever, world_config
from rag_mm.worlds.emoji import art, scene_facts

PAGE = "report.html"
COSTS = "quickstart"  # Key of metrics.json under which a whole run's costs stand.
INPUTS = (*generate_samples.INPUTS, "generation", "evaluation")


@dataclasses.dataclass(frozen=True)
class ReportStageConfig:
    """What the page shows; see `report.selection` for which test documents.

    Attributes:
        seed: shown on the page.
        world: where the test documents come from.
        generation: the config of that stage.
        num_flags: held-out flags on the first screen, as far as there are so many.
        num_others: other held-out entities there.
        num_rows: rows of every other panel: those of the first screen, then further entities.
        reference: a file made by `report.reference`, for the bands behind the training curves; "" for none.
        title: of the page.
        command: shown as the one that made the page.
        notes: sentences shown under the title.
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
        for name, least in (("num_flags", 0), ("num_others", 0), ("num_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least {least}")
        reference.load(self.reference)  # A damaged one is found before anything is trained.


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedExamples:
    """Places in the held-out test set, one a class: the story's, then further ones; int64 [R]."""

    places: np.ndarray
    num_story: int
    num_flags: int

    @property
    def rule(self) -> str:
        """How the story's were chosen."""
        return selection.rule(self.num_flags, self.num_story - self.num_flags)


def run(config: ReportStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Writes the figures into the stage; `finish` makes the page once all costs are known."""
    bench = generate_samples.open_eval_context(config.generation, run)
    report.save_figures(gather_data(config, run, bench, {}), stage_dir / "figures")
    return {}


def finish(config: ReportStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Adds up what the stages cost, measures speed, and writes `report.html` beside metrics.json."""
    bench = generate_samples.open_eval_context(config.generation, run)
    run.save_costs(COSTS, stages, **latency.measure(config.generation, run, bench))
    page = run.workdir / PAGE
    data = gather_data(config, run, bench, run.metrics)
    files.write_atomic(page, report.render_report(data).encode())
    return page


def gather_data(
    config: ReportStageConfig,
    run: run_folder.Run,
    bench: generate_samples.EvalContext,
    metrics: dict[str, Any],
) -> report.ReportData:
    """Everything on the page."""
    memory = build_memory.open_memory(run)
    shown = select_examples(config, bench.tests["held_out"])
    generations = list(_generations(config, bench, run, memory, shown.places))
    healthy = reference.load(config.reference)
    costs = metrics.get(run_folder.MACHINE, {})
    return report.ReportData(
        title=config.title,
        command=config.command,
        seed=config.seed,
        version=rag_mm.__version__,
        metrics={k: v for k, v in metrics.items() if k != run_folder.MACHINE},
        config=run.config,
        setting=_setting(config, len(memory), run.config),
        notes=config.notes,
        machine=_machine(),
        stage_seconds={
            stage: costs[stage]["wall_seconds"] for stage in run.config["stages"] if stage in costs
        },
        story=generations[: shown.num_story],
        choice=shown.rule,
        reconstructions=_reconstructions(bench, shown.places),
        retrievals=list(_retrievals(bench, memory, shown.places)),
        generations=generations,
        captions=_captions(bench, run, shown.places),
        curves=list(logs.read_curves(run.workdir, healthy.bands if healthy else {})),
        band_note=healthy.note if healthy else "",
    )


def select_examples(config: ReportStageConfig, test: generate_samples.TestSet) -> SelectedExamples:
    """One document of every class shown, the same in every panel."""
    class_ids = test.class_ids
    is_flag = art.load_art().is_flag[class_ids]
    story = selection.choose(class_ids, is_flag, config.num_flags, config.num_others)
    further = np.setdiff1d(selection.first_of_each_class(class_ids), story)
    places = np.concatenate([story, further[: max(0, config.num_rows - len(story))]])
    return SelectedExamples(places, len(story), int(is_flag[story].sum()))


def _machine() -> str:
    machine = clock.machine()
    versions = machine["versions"]
    cores = f"{machine['processor']}, {machine['cores']} cores"
    return f"{cores}, Python {machine['python']}, jax {versions['jax']}, flax {versions['flax']}"


def _setting(
    config: ReportStageConfig, num_rows: int, whole: Mapping[str, Any]
) -> list[tuple[str, str]]:
    world = config.world
    retriever = train_retriever.RetrieverStageConfig
    taught = whole.get("retriever", {}).get("splits", retriever.splits)
    return [
        ("Level of the scenes", ", ".join(world.levels)),
        ("Classes seen in training", f"{len(world.classes(*world_config.SEEN)):,}"),
        ("Classes never shown in training", f"{len(world.classes(*world_config.HELD_OUT)):,}"),
        ("Classes the retriever saw", ", ".join(taught)),
        ("Documents in the memory", f"{num_rows:,}"),
    ]


def _reconstructions(
    bench: generate_samples.EvalContext, places: np.ndarray
) -> list[report.Reconstruction]:
    test = bench.tests["held_out"]
    decoded = bench.image_tokenizer.decode(np.stack([test.mains[i].codes for i in places]))
    return [
        report.Reconstruction(test.captions[i], test.pictures[i], back)
        for i, back in zip(places, decoded, strict=True)
    ]


def _retrievals(
    bench: generate_samples.EvalContext, memory: Memory, places: np.ndarray
) -> Iterator[report.Retrieval]:
    test = bench.tests["held_out"]
    queries = bench.encoder.encode_text([test.captions[i] for i in places])
    vectors = memory.embeddings("mixed")
    for i, query in zip(places, queries, strict=True):
        hits = []
        for row in test.hits[i][test.hits[i] >= 0]:
            document = memory.document(int(row))
            pixels = coded_corpus.memory_image(memory, int(row))
            hits.append(report.Hit(document.text, pixels, float(query @ vectors[row])))
        yield report.Retrieval(test.captions[i], hits)


def _generations(
    config: ReportStageConfig,
    bench: generate_samples.EvalContext,
    run: run_folder.Run,
    memory: Memory,
    places: np.ndarray,
) -> Iterator[report.Generation]:
    test, folder = bench.tests["held_out"], run.finished_stage("generation")
    asked, levels = [test.facts[i] for i in places], [test.levels[i] for i in places]
    drawn, right = {}, {}
    for name in (v.name for v in test.variants):
        codes = files.read_array(folder / f"held_out_{name}_codes.npy")[places]
        drawn[name] = bench.image_tokenizer.decode(codes)
        right[name] = [
            scene_facts.compare(got, wanted, level)
            for got, wanted, level in zip(
                scene_facts.read(drawn[name], levels), asked, levels, strict=True
            )
        ]
    for n, i in enumerate(places):
        yield report.Generation(
            test.captions[i],
            test.pictures[i],
            [coded_corpus.memory_image(memory, int(row)) for row in test.hits[i] if row >= 0],
            {name: pictures[n] for name, pictures in drawn.items()},
            {name: verdicts[n] for name, verdicts in right.items()},
        )


def _captions(
    bench: generate_samples.EvalContext, run: run_folder.Run, places: np.ndarray
) -> list[report.CaptionExample]:
    test, folder = bench.tests["held_out"], run.finished_stage("generation")
    written = {
        name: files.read_json(folder / f"held_out_{name}_captions.json")["captions"]
        for name in (v.name for v in test.variants if v.by_image is not None)
    }
    return [
        report.CaptionExample(
            test.pictures[i], test.captions[i], {name: texts[i] for name, texts in written.items()}
        )
        for i in places
    ]
