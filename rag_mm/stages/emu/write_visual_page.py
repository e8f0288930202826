"""Writes visual.html at the end of a chain with the stage `visual_figures`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.report import curves, decoding_page, figures, logs, visual_verdicts
from rag_mm.report.content import Band, Curve
from rag_mm.report.decoding_page import Frame, PageSection, Strip, TextTable
from rag_mm.stages.emu import measure_visual
from rag_mm.stages.emu.measure_visual import VisualFiguresStageConfig

PAGE = "visual.html"
_VERDICTS = {"yes": "met", "no": "not met", "unknown": figures.MISSING}
_SHARES, _ERROR = ("place", "color", "entity"), "mse"
_LABELS = {
    "original": "original",
    "none": "caption alone",
    "oracle": "with a document of its class",
    "retrieved": "with the retrieved document",
    "wrong": "with a document of another class",
    "encoded": "from the encoder's codes",
    "null": "from the empty prompt",
    "control_none": "control: caption alone",
    "control_oracle": "control: with a document of its class",
    "control_encoded": "control: from the encoder's codes",
    "story": "drawn after caption, image and sentence",
    "sentence": "drawn after the sentence alone",
    "first_image": "first image",
    "first": "first image",
    "second": "second image",
    "blend": "drawn after both",
}
# A logged figure, its chart, and what is healthy at the end of training.
_CURVES = (
    ("loss", "Error of the prediction", None),
    ("seen_mse", "Squared error of pixels, seen classes, captions alone", (0.0, 0.06)),
    ("seen_place", "Place drawn, seen classes", (0.95, 1.0)),
    ("seen_color", "Color drawn, seen classes", (0.95, 1.0)),
    ("seen_entity", "Entity drawn, seen classes", None),
)
_LABEL = {"visual_decoder": "on rollouts", measure_visual.CONTROL: "on the encoder's codes"}


def finish(
    config: VisualFiguresStageConfig, run: run_folder.Run, stages: Sequence[str]
) -> epath.Path:
    """Writes the page next to metrics.json."""
    del stages
    folder = run.finished_stage("visual_figures")
    found = run.metrics["visual_figures"]
    page = decoding_page.render(
        f"Emu's visual decoder, seed {config.seed}",
        "What a diffusion model draws from the codes that Emu regresses from prompts. Scenes are test scenes "
        "of classes that Emu has not seen unless seen is said; the noise of a scene is the same everywhere.",
        [*_tables(found), *_pictures(folder), *_training(run)],
    )
    files.write_atomic(run.workdir / PAGE, page.encode())
    return run.workdir / PAGE


def _tables(found: Mapping[str, Any]) -> Iterator[PageSection]:
    claims = [
        [claim.claim, claim.required, claim.measured, _VERDICTS[claim.status]]
        for claim in visual_verdicts.claims(found)
    ]
    table = TextTable(("claim", "required", "measured", ""), claims)
    yield PageSection(
        "Claims", "Thresholds were fixed before anything was measured.", tables=[table]
    )
    names = {"held_out": "held-out classes", "seen": "seen classes", "held_out_stories": "stories"}
    head = ("drawn", "squared error", *_SHARES)
    tables = [
        TextTable(head, _rows(found[split]), name.capitalize())
        for split, name in names.items()
        if split in found
    ]
    text = (
        "The error is of pixels in 0..1; place, color and entity are what the scorer reads. Guidance is of "
        "captions alone. The control is trained on the encoder's codes, with the same data and steps."
    )
    yield PageSection("Figures", text, tables=tables)


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            label(name),
            figures.number(figures.find(found, f"{_ERROR}.{name}"), 4),
            *(figures.percent(figures.find(found, f"{fact}.{name}")) for fact in _SHARES),
        ]
        for name in sorted(found[_ERROR], key=_place)
    ]


def _place(name: str) -> tuple[int, str]:
    """Where a variant's row is: in the order of the labels, then the weights of guidance."""
    return ([*_LABELS].index(name) if name in _LABELS else len(_LABELS), name)


def label(name: str) -> str:
    """What a variant is called on the page."""
    if name.startswith("guidance_"):
        return f"guidance {name.removeprefix('guidance_').replace('_', '.')}"
    return _LABELS[name]


def _pictures(folder: epath.Path) -> Iterator[PageSection]:
    kept = {
        name: files.read_object(folder / f"{name}.json", kinds=list)
        for name in (measure_visual.EXAMPLES, measure_visual.STORIES, measure_visual.BLENDS)
    }
    captions = kept[measure_visual.EXAMPLES]["captions"]
    stories = [" · ".join(texts) for texts in kept[measure_visual.STORIES]["texts"]]
    yield PageSection(
        "Captions",
        "The original, what is drawn after prompts, from the codes of the original's encoder, and from the "
        "empty prompt.",
        strips=_strips(folder, measure_visual.EXAMPLES, kept, captions),
    )
    yield PageSection(
        "In context",
        "Given are a caption, an image and a sentence; the second image is drawn.",
        strips=_strips(folder, measure_visual.STORIES, kept, stories),
    )
    yield PageSection(
        "Blends",
        "Given are two images and no text.",
        strips=_strips(folder, measure_visual.BLENDS, kept, []),
    )


def _strips(
    folder: epath.Path, name: str, kept: Mapping[str, Any], captions: Sequence[str]
) -> list[Strip]:
    """A row of images for each example."""
    images = {kind: files.read_array(folder / f"{name}_{kind}.npy") for kind in kept[name]["kinds"]}
    count = len(next(iter(images.values())))
    return [
        Strip(
            captions[i] if captions else "",
            [Frame(np.asarray(each[i]), [label(kind)]) for kind, each in images.items()],
        )
        for i in range(count)
    ]


def _training(run: run_folder.Run) -> Iterator[PageSection]:
    lines: list[Curve] = []
    for figure, chart, healthy in _CURVES:
        for stage, name in _LABEL.items():
            values = logs.read_values(run.workdir, logs.Line(stage, figure, chart, name))
            if not values:
                continue
            band = None
            if healthy is not None and stage == "visual_decoder":
                low, high = healthy
                steps = [min(values), max(values)]
                band = Band(steps, [low] * 2, [high] * 2, [(low + high) / 2] * 2)
            lines.append(Curve(chart, name, [*values], [*values.values()], band))
    if lines:
        text = "Shaded: healthy at the end of this page's training."
        yield PageSection("Training", text, picture=(curves.curves_png(lines), "training curves"))
