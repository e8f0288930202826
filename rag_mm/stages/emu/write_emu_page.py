"""Writes emu.html at the end of a chain with the stage `emu_figures`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.report import emu_page, emu_verdicts, logs
from rag_mm.report.content import Band, Curve
from rag_mm.stages.emu import measure_emu
from rag_mm.stages.emu.measure_emu import EmuFiguresStageConfig
from rag_mm.stages.shared import world_config

PAGE = "emu.html"


class _Healthy(NamedTuple):
    """A logged figure, its chart, and what is healthy at the end of training; None: no bound."""

    figure: str
    chart: str
    low: float | None = None
    high: float | None = None


_CURVES = (
    _Healthy("text_ce", "Cross-entropy of text (nats)", 0.0, emu_verdicts.MAX_TEXT_CE),
    _Healthy("image_r2", "R2 of the next code, within a batch", emu_verdicts.MIN_R2["oracle"], 1.0),
    _Healthy("participation_ratio", "Participation ratio of codes, within a batch", 4.0, None),
    _Healthy("image_variance", "Variance of codes between images"),
    _Healthy("anchor_mse", "Error of the anchor: vision tokens from codes"),
)


def finish(config: EmuFiguresStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Writes the page next to metrics.json."""
    del stages
    folder = run.finished_stage("emu_figures")
    page = emu_page.render(
        f"Emu, seed {config.seed}",
        _lead(run),
        run.metrics,
        list(_found(folder)),
        list(_written(folder)),
        list(_curves(run)),
    )
    files.write_atomic(run.workdir / PAGE, page.encode())
    return run.workdir / PAGE


def _lead(run: run_folder.Run) -> str:
    manifest, seen = run.manifest("retriever"), "has"
    if manifest is not None and "splits" in manifest.config:
        held_out = {*world_config.HELD_OUT, *world_config.TUNE, *world_config.TEST}
        seen = "has" if held_out & set(manifest.config["splits"]) else "has not"
    return (
        f"Figures are of test scenes. The image tower, the run's frozen retriever, {seen} seen the held-out "
        "classes; Emu has not."
    )


def _found(folder: epath.Path) -> Iterator[emu_page.Found]:
    """What `measure_emu` kept of a few held-out scenes."""
    kept = files.read_object(folder / measure_emu.EXAMPLES, captions=list, own=dict)
    pixels = {name: files.read_array(folder / f"nearest_{name}.npy") for name in kept["own"]}
    for i, caption in enumerate(kept["captions"]):
        nearest = {name: (pixels[name][i], int(own[i])) for name, own in kept["own"].items()}
        yield emu_page.Found(caption, nearest)


def _written(folder: epath.Path) -> Iterator[emu_page.Written]:
    texts = files.read_object(folder / f"held_out_{measure_emu.CAPTIONS}", wanted=list)
    images = files.read_array(folder / "own.npy")
    names = [name for name in emu_page.DOCUMENTS if name in texts]
    scenes = files.read_object(folder / measure_emu.EXAMPLES, scenes=list)["scenes"]
    for i, image in zip(scenes, images, strict=True):
        written = {name: texts[name][i] for name in names}
        yield emu_page.Written(image, texts["wanted"][i], written)


def _curves(run: run_folder.Run) -> Iterator[Curve]:
    for each in _CURVES:
        values = logs.read_values(run.workdir, logs.Line("emu", each.figure, each.chart, "train"))
        if not values:
            continue
        band = None
        if each.low is not None:
            steps = [min(values), max(values)]
            high = each.high if each.high is not None else max(2 * each.low, *values.values())
            band = Band(steps, [each.low] * 2, [high] * 2, [(each.low + high) / 2] * 2)
        yield Curve(each.chart, "train", [*values], [*values.values()], band)
