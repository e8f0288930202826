"""Joint training against training on text alone: how likely two runs find the captions of the same scenes."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.eval import statistics
from rag_mm.stages.stage import PER_DOCUMENT

STAGE, FIGURE = "emu_figures", "caption_nll"


def fingerprint(workdir: str) -> str:
    """The fingerprint of another run's figures; UserError if it has none."""
    manifest = run_folder.Run(epath.Path(workdir)).manifest(STAGE)
    if manifest is None or not manifest.is_done:
        raise UserError(
            f"emu_figures.text_alone is {workdir}, which has no finished {STAGE}; give a run of the preset "
            "text_alone."
        )
    return manifest.fingerprint


def read(workdir: str, wanted: Mapping[str, list[str]], name: str) -> dict[str, Any]:
    """The values of each scene that another run kept.

    Args:
        workdir: the other run.
        wanted: by split, the captions of this run's tested scenes.
        name: of the file of a split's captions, which has them as `wanted`.

    Raises:
        UserError: it is unfinished or edited, or has been measured on other scenes.
    """
    folder = run_folder.Run(epath.Path(workdir)).finished_stage(STAGE)
    for split, captions in wanted.items():
        if files.read_object(folder / f"{split}_{name}", wanted=list)["wanted"] != captions:
            raise UserError(
                f"emu_figures.text_alone is {workdir}, which was measured on other scenes; give a run of the "
                "same seed, world and number of scenes."
            )
    return files.read_object(folder / PER_DOCUMENT)


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """By documents, the mean NLL of captions divided by that of the other run, with its interval.

    Args:
        ours: values of a split by documents and figure, one a scene.
        theirs: those of the other run, of the same scenes.
    """
    return {
        documents: statistics.ratio_of_means(figures[FIGURE], theirs[documents][FIGURE], FIGURE)
        for documents, figures in ours.items()
        if FIGURE in figures
    }
