"""How well a decoder answers each task while it is tuned, on scenes of the held-out classes for choices.

A task may be learnt all at once, hundreds of steps after the others; the loss hardly shows it.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from rag_mm.core import run_folder
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.report import curves, logs
from rag_mm.report.content import Curve
from rag_mm.report.decoding_page import PageSection
from rag_mm.stages.cm3leon.measure_tasks import AskedScenes, TaskScorer
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask

SPLIT = "tune"


@dataclasses.dataclass(frozen=True, eq=False)
class TaskWatch:
    """Measures tasks at every checkpoint.

    Attributes:
        scenes: of tune classes.
        chosen: the tasks; those that no scene has an item of are left out.
        sampling: of image codes.
        seed: of sampling.
    """

    scenes: AskedScenes
    chosen: Sequence[InstructionTask]
    sampling: Sampling
    seed: int

    def __call__(self, step: int, generator: tasks.Generator) -> dict[str, float]:
        """`tune_TASK`, the share of items that are right, of each task."""
        del step
        scorer = TaskScorer(self.scenes, lambda: generator, self.sampling, self.seed)
        found = {}
        for task in self.chosen:
            if self.scenes.items(task)[0]:
                asked = scorer.ask(task)
                scores = scorer.score(asked, scorer.answer(asked))[task.figure]
                found[f"{SPLIT}_{task.name}"] = float(np.mean(scores))
        return found


def section(run: run_folder.Run, stage: str, names: Sequence[str]) -> Iterator[PageSection]:
    """The curves of the tasks over steps, if the run was watched.

    Args:
        run: the run.
        stage: its stage that tuned the decoder.
        names: of the tasks.
    """
    lines = []
    for name in names:
        values = logs.read_values(
            epath.Path(run.workdir), logs.Line(stage, f"{SPLIT}_{name}", name, "right")
        )
        if values:
            lines.append(Curve(name, "right", [*values], [*values.values()]))
    if lines:
        text = (
            "Share of right answers on scenes of other held-out classes, those on which choices are made. A "
            "task that is still at its first value at the end was not learnt: give more steps or examples."
        )
        yield PageSection("While tuning", text, picture=(curves.curves_png(lines), "task curves"))
