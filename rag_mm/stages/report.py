"""Stage `report`: one page a person looks at, and the same pictures as PNG files."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

import rag_mm
from rag_mm import report
from rag_mm.core import clock, files
from rag_mm.core import run as run_lib
from rag_mm.memory.memory import Memory
from rag_mm.stages import corpus as corpus_lib
from rag_mm.stages import generation, neighbors
from rag_mm.stages import memory as memory_stage
from rag_mm.stages import world as world_lib
from rag_mm.train import metrics as train_metrics
from rag_mm.worlds.emoji import facts as facts_lib

PAGE = "report.html"
INPUTS = (*generation.INPUTS, "generation", "evaluation")
CURVES = (
    ("tokenizer", "psnr", "Image tokenizer: PSNR (dB)", "train"),
    ("tokenizer", "code_usage", "Image tokenizer: share of codes in use", "train"),
    ("retriever", "loss", "Retriever: contrastive loss (nats)", "train"),
    ("decoder", "code_nll", "Decoder: NLL per image code (nats)", "with retrieval"),
    ("control", "code_nll", "Decoder: NLL per image code (nats)", "vanilla"),
    ("decoder", "text_nll", "Decoder: NLL per text token (nats)", "with retrieval"),
    ("control", "text_nll", "Decoder: NLL per text token (nats)", "vanilla"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """`num_rows` rows in every panel: the first ones, not chosen ones."""

    seed: int
    world: world_lib.World
    generation: generation.Config
    num_rows: int = 12
    title: str = "rag_mm quickstart"
    command: str = "make quickstart"
    notes: tuple[str, ...] = ()


def run(config: Config, run: run_lib.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Writes the figures into the stage; `write_page` makes the page once all costs are known."""
    report.save_figures(gather(config, run, {}), stage_dir / "figures")
    return {}


def write_page(config: Config, run: run_lib.Run) -> epath.Path:
    """Writes `report.html` beside metrics.json."""
    data = gather(config, run, run.metrics)
    page = run.workdir / PAGE
    files.write_atomic(page, report.render_report(data).encode())
    return page


def gather(config: Config, run: run_lib.Run, metrics: dict[str, Any]) -> report.ReportData:
    """Everything on the page."""
    bench = generation.open_bench(config.generation, run)
    memory = memory_stage.open_memory(run)
    costs = metrics.get(run_lib.MACHINE, {})
    return report.ReportData(
        title=config.title,
        command=config.command,
        seed=config.seed,
        version=rag_mm.__version__,
        metrics={k: v for k, v in metrics.items() if k != run_lib.MACHINE},
        config=run.config,
        setting=_setting(config, len(memory)),
        notes=config.notes,
        machine=_machine(),
        stage_seconds={stage: cost["wall_seconds"] for stage, cost in costs.items()},
        reconstructions=_reconstructions(config, bench),
        retrievals=list(_retrievals(config, bench, memory)),
        generations=list(_generations(config, bench, run, memory)),
        captions=_captions(config, bench, run),
        curves=list(_curves(run)),
    )


def _machine() -> str:
    machine = clock.machine()
    versions = machine["versions"]
    cores = f"{machine['processor']}, {machine['cores']} cores"
    return f"{cores}, Python {machine['python']}, jax {versions['jax']}, flax {versions['flax']}"


def _setting(config: Config, num_rows: int) -> list[tuple[str, str]]:
    world = config.world
    return [
        ("Level of the scenes", world.level),
        ("Classes seen in training", f"{len(world.classes(*world_lib.SEEN)):,}"),
        ("Classes never shown in training", f"{len(world.classes(*world_lib.HELD_OUT)):,}"),
        ("Documents in the memory", f"{num_rows:,}"),
    ]


def _reconstructions(config: Config, bench: generation.Bench) -> list[report.Reconstruction]:
    test, n = bench.tests["held_out"], config.num_rows
    decoded = bench.codec.decode(np.stack([main.codes for main in test.mains[:n]]))
    return [
        report.Reconstruction(caption, original, back)
        for caption, original, back in zip(test.captions, test.pictures, decoded, strict=False)
    ]


def _retrievals(
    config: Config, bench: generation.Bench, memory: Memory
) -> Iterator[report.Retrieval]:
    test = bench.tests["held_out"]
    queries = bench.encoder.encode_text(test.captions[: config.num_rows])
    vectors = memory.embeddings("mixed")
    for caption, query, found in zip(test.captions, queries, test.docs_by_text, strict=False):
        hits = []
        for row in found[found >= 0]:
            document = memory.document(int(row))
            score = float(query @ vectors[row])
            pixels = corpus_lib.picture(memory, int(row))
            hits.append(report.Hit(document.text, pixels, score))
        yield report.Retrieval(caption, hits)


def _generations(
    config: Config, bench: generation.Bench, run: run_lib.Run, memory: Memory
) -> Iterator[report.Generation]:
    test, n, level = bench.tests["held_out"], config.num_rows, config.world.geometry
    source = config.world.scenes("test", *neighbors.TEST_SPLITS["held_out"])
    asked = [source.facts(int(row)) for row in test.scene_rows[:n]]
    scorer, folder = facts_lib.Scorer(level), run.finished_stage("generation")
    drawn, right = {}, {}
    for name, _, _ in bench.variants():
        codes = files.read_array(folder / f"held_out_{name}_codes.npy")[:n]
        drawn[name] = bench.codec.decode(codes)
        read = scorer.read(drawn[name])
        right[name] = [
            facts_lib.compare(got, wanted, level) for got, wanted in zip(read, asked, strict=True)
        ]
    for i, caption in enumerate(test.captions[:n]):
        found = [row for row in test.docs_by_text[i] if row >= 0]
        yield report.Generation(
            caption,
            test.pictures[i],
            [corpus_lib.picture(memory, int(row)) for row in found],
            {name: pictures[i] for name, pictures in drawn.items()},
            {name: verdicts[i] for name, verdicts in right.items()},
        )


def _captions(
    config: Config, bench: generation.Bench, run: run_lib.Run
) -> list[report.WrittenCaption]:
    test, folder = bench.tests["held_out"], run.finished_stage("generation")
    written = {
        name: files.read_json(folder / f"held_out_{name}_captions.json")["captions"]
        for name, _, _ in bench.variants()
    }
    return [
        report.WrittenCaption(
            test.pictures[i], test.captions[i], {name: texts[i] for name, texts in written.items()}
        )
        for i in range(min(config.num_rows, len(test.scene_rows)))
    ]


def _curves(run: run_lib.Run) -> Iterator[report.Curve]:
    for stage, key, chart, label in CURVES:
        rows = train_metrics.read_log(run.stage_dir(stage) / "log.jsonl")
        yield report.Curve(chart, label, [r["step"] for r in rows], [r[key] for r in rows])
