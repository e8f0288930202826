"""Writes sft.html at the end of a chain with the stage `sft`."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.report import decoding_page
from rag_mm.stages.cm3leon import tuning_tables, watch_tasks
from rag_mm.stages.cm3leon.measure_tasks import AskedScenes
from rag_mm.stages.cm3leon.tune_decoder import TuningStageConfig
from rag_mm.stages.cm3leon.tuning_pictures import TuningPictures
from rag_mm.stages.ra_cm3 import write_report
from rag_mm.stages.shared import train_tokenizer

PAGE = "sft.html"
STAGE = "sft"


def finish(config: TuningStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Writes the page next to metrics.json."""
    metrics = run.metrics[STAGE]
    sections = []
    if "tasks" in metrics:
        scenes = AskedScenes(
            run, config.world, train_tokenizer.load_tokenizer(run.workdir), config.num_test
        )
        names = list(metrics["tasks"]["tuned"])
        pictures = TuningPictures(scenes, run.finished_stage(STAGE), names)
        weights = config.edit_weights if metrics.get("guidance") else ()
        sections = [
            tuning_tables.tasks(metrics),
            tuning_tables.claims(metrics),
            *pictures.sections(),
            tuning_tables.guidance(metrics, weights, pictures.guided(weights)),
            tuning_tables.copied(metrics),
        ]
    sections += watch_tasks.section(run, STAGE, config.measured)
    page = decoding_page.render(
        f"Instruction tuning, seed {config.seed}", _lead(config, run, metrics), sections
    )
    files.write_atomic(run.workdir / PAGE, page.encode())
    return run.workdir / PAGE


def _lead(config: TuningStageConfig, run: run_folder.Run, metrics: Mapping[str, Any]) -> str:
    """What was trained, and on what it was measured."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in metrics["shares"].items())
    trained = (
        f"{config.loop.num_steps:,} steps of {config.batch_size} sequences from the stage "
        f"{config.start_from}, {'LoRA' if config.lora else 'the whole decoder'}; loss at the end "
        f"{metrics['train'].get('loss', float('nan')):.3f}. Mixture: {shares}."
    )
    if not config.num_test:
        return f"{trained} Nothing was measured (num_test is 0)."
    seen = write_report.what_was_seen(write_report.retriever_splits(run.config))
    return (
        f"{trained} Measured on {config.num_test} test scenes of held-out classes, untuned and tuned, with "
        f"the same items, documents and seeds; temperature {config.temperature:g} of pictures, the "
        f"likeliest answers in words. {seen}"
    )
