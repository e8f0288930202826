"""Writes decoding.html at the end of a chain with the stage `decoding`, and measures speed."""

from collections.abc import Sequence

from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.report import decoding_page
from rag_mm.stages.cm3leon import decoding_pictures, decoding_speed, decoding_tables
from rag_mm.stages.cm3leon.decoding_scenes import open_scenes
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig
from rag_mm.stages.ra_cm3 import write_report

PAGE = "decoding.html"
COSTS = "decoding_speed"  # Key in metrics.json.


def finish(config: DecodingStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Measures speed and writes the page next to metrics.json."""
    scenes = open_scenes(config, run)
    speeds = decoding_speed.measure(config, scenes)
    figures = {name: value for speed in speeds for name, value in speed.figures.items()}
    if (ratio := decoding_speed.ratio(speeds)) is not None:
        figures[decoding_speed.RATIO] = round(ratio, 3)
    run.save_costs(COSTS, stages, **figures)
    metrics = run.metrics["decoding"]
    pictures = decoding_pictures.DecodingPictures(config, scenes, run.finished_stage("decoding"))
    sections = [
        decoding_tables.claims(metrics),
        pictures.sweep(metrics),
        decoding_tables.other_steering(config, metrics),
        pictures.ranking(metrics),
        decoding_tables.parallel(config, metrics),
        decoding_tables.speed(speeds, ratio),
        decoding_tables.over_reliance_table(config, metrics, scenes.num_copyable()),
    ]
    page = decoding_page.render(
        f"Decoding, seed {config.seed}", _lead(config, run, metrics["num_scenes"]), sections
    )
    files.write_atomic(run.workdir / PAGE, page.encode())
    return run.workdir / PAGE


def _lead(config: DecodingStageConfig, run: run_folder.Run, num_scenes: int) -> str:
    """What all figures are of, and what has helped them."""
    seen = write_report.what_was_seen(write_report.retriever_splits(run.config))
    documents = {0: "no documents", 1: "the document that its caption retrieves"}.get(
        config.num_docs,
        f"the {config.num_docs} documents that its caption retrieves, the best last",
    )
    return (
        f"{num_scenes} test scenes of held-out classes (test), each drawn with {documents}; the same scenes "
        "and seeds in every setting, so that differences are paired by scene. Joint accuracy is the share of "
        f"images whose entity, place and color are all right. ± is one standard error over scenes. {seen}"
    )
