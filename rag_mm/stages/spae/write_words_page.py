"""Writes spae.html at the end of a chain with the stage `spae`: figures by level, words of test images."""

from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from rag_mm.core import code_grids, files, run_folder
from rag_mm.report import logs, word_figure, words_page
from rag_mm.report.content import Curve
from rag_mm.stages.shared import frozen, given_models, world_config
from rag_mm.stages.spae import image_words, word_images
from rag_mm.stages.spae.train_autoencoder import SPAEStageConfig
from rag_mm.train import train_metrics

PAGE = "spae.html"
_NUM_PICTURES = 4
_NORM_CHART = "Length of the latents over that of the words, by level"


def finish(config: SPAEStageConfig, run: run_folder.Run, stages: Sequence[str]) -> epath.Path:
    """Writes the page next to metrics.json."""
    del stages
    tokenizer = frozen.FrozenTokenizer(given_models.find_model(run.workdir, "spae"))
    pictures = dict(_pictures(config, run)) if tokenizer.words is not None else {}
    page = words_page.render(
        f"SPAE, seed {config.seed}",
        _lead(config, run),
        run.metrics["spae"],
        tokenizer.grids,
        _last_figures(run),
        pictures,
        list(_curves(config, run)),
    )
    files.write_atomic(run.workdir / PAGE, page.encode())
    return run.workdir / PAGE


def _lead(config: SPAEStageConfig, run: run_folder.Run) -> str:
    """What the figures are of, and what has helped them."""
    splits = " and ".join(config.eval_splits)
    what = f"Figures are of test images of {splits} classes, which the autoencoder has not seen."
    if "words" not in run.metrics["spae"]:
        return what
    retriever = "has"
    manifest = run.manifest("retriever")
    if manifest is not None and "splits" in manifest.config:
        held_out = {*world_config.HELD_OUT, *world_config.TUNE, *world_config.TEST}
        retriever = "has" if held_out & set(manifest.config["splits"]) else "has not"
    return (
        f"The retriever, which ranks words for images, {retriever} seen the held-out classes, and features "
        f"of words are made of the names of all classes unless a column says otherwise. {what}"
    )


def _pictures(
    config: SPAEStageConfig, run: run_folder.Run
) -> Iterator[tuple[str, word_figure.WordedImage]]:
    source = config.world.scenes("test", *config.eval_splits)
    opened = word_images.load(run.workdir)
    for row in world_config.evenly_spaced(np.arange(len(source)), _NUM_PICTURES):
        caption = source.full_caption(int(row))
        yield caption, image_words.describe(opened, source.image(int(row)))


def _last_figures(run: run_folder.Run) -> dict[str, float]:
    """The figures of the last line of the stage's log."""
    lines = train_metrics.read_log(run.stage_dir("spae") / "log.jsonl")
    return lines[-1] if lines else {}


def _curves(config: SPAEStageConfig, run: run_folder.Run) -> Iterator[Curve]:
    model = config.model
    count = len(code_grids.ends(model.grids_at(model.image_size, model.image_size)))
    levels = [f"level{number}" for number in range(1, count + 1)] if count > 1 else []
    lines = [
        logs.Line("spae", "psnr", "PSNR (dB)", "train"),
        logs.Line("spae", "semantic_loss", "Semantic loss (nats)", "train"),
        *(logs.Line("spae", f"perplexity_{name}", "Perplexity by level", name) for name in levels),
        *(
            logs.Line("spae", f"latent_error_{name}", "Share of the latents left by level", name)
            for name in levels
        ),
        *(logs.Line("spae", f"latent_norm_{name}", _NORM_CHART, name) for name in levels),
    ]
    for line in lines:
        if values := logs.read_values(run.workdir, line):
            yield Curve(line.chart, line.label, [*values], [*values.values()])
