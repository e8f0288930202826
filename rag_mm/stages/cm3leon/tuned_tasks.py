"""Which tasks a decoder was tuned on, and whether they include what a request asks for."""

from collections.abc import Collection, Mapping
from typing import Any

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_files, instruction_templates
from rag_mm.stages.cm3leon.instruction_suites import SUITES

QUESTIONS = SUITES["vqa"]
BOXES = ("draw_boxes", "boxes")
# Those of scenes are of one feature each, which their wording names; the last is of any.
STRUCTURES = ("from_silhouette", "from_edges", "structure")


def edits(num_pictures: int) -> tuple[str, ...]:
    """The edits that are given so many pictures."""
    return tuple(
        name
        for name in SUITES["edit"]
        if len(instruction_templates.TEMPLATES[name][0].given) == num_pictures
    )


def read(run: run_folder.Run, stage: str) -> frozenset[str]:
    """The tasks that a stage tuned a decoder on, names of `instruction_templates.TEMPLATES`; none untuned."""
    manifest = run.manifest(stage)
    config: Mapping[str, Any] = manifest.config if manifest is not None else {}
    tasks, sources = config.get("tasks"), config.get("files")
    names = set(tasks) if isinstance(tasks, Mapping) else set()
    if isinstance(sources, list):
        layouts = [str(source).partition(":")[0] for source in sources]
        names |= {
            instruction_files.TASKS[name] for name in layouts if name in instruction_files.TASKS
        }
    return frozenset(names & set(instruction_templates.TEMPLATES))


def known(tuned: Collection[str], wanted: Collection[str], what: str) -> list[str]:
    """Those of the wanted tasks that a decoder was tuned on, in their order.

    Args:
        tuned: the tasks that it was tuned on.
        wanted: tasks, any one of which will do.
        what: what they are, as `questions`, for the error.

    Raises:
        UserError: it is not tuned, or on none of them.
    """
    found = [name for name in wanted if name in tuned]
    if found:
        return found
    if not tuned:
        raise UserError(
            f"This decoder was not tuned on {what}; load the one that was (stage sft, --stage=sft), which "
            "configs/cm3leon.py:sft trains."
        )
    raise UserError(
        f"This decoder was tuned on {', '.join(sorted(tuned))}, not on {what}; tune one on "
        f"{' or '.join(wanted)}."
    )
