"""What tuning has changed: every task before and after, edits with two conditions, over-reliance."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, progress
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import over_reliance, statistics
from rag_mm.stages.cm3leon import edit_guidance, judge_tuning, scene_instructions
from rag_mm.stages.cm3leon.edit_guidance import Weights
from rag_mm.stages.cm3leon.judge_tuning import TUNED, UNTUNED, Scores, copied_name, scored_name
from rag_mm.stages.cm3leon.measure_tasks import SPLIT, Answers, AskedScenes, AskedTask, TaskScorer
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import find_neighbors, given_memory
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import scene_facts

FOLDER = "answers"


def read_scores(stage_dir: epath.Path, name: str) -> dict[str, list[int]]:
    """The scores of each item that a finished measurement wrote, 0 or 1."""
    return files.read_object(stage_dir / FOLDER / f"{name}.json", scores=dict)["scores"]


def read_answers(stage_dir: epath.Path, name: str) -> Answers:
    """What was answered to each item of a finished measurement: texts, or codes of pictures."""
    return files.read_object(stage_dir / FOLDER / f"{name}.json", answers=list)["answers"]


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What is measured, and where it is written.

    Attributes:
        scenes: what is asked about.
        start: folder of the stage whose decoder was tuned.
        stage_dir: of the tuned one; receives the files.
        chosen: the tasks.
        sampling: of image codes; answers in words are the likeliest.
        seed: of sampling.
        edit_weights: weights of picture and instruction with which the edits among the tasks are drawn.
    """

    scenes: AskedScenes
    start: epath.Path
    stage_dir: epath.Path
    chosen: Sequence[InstructionTask]
    sampling: Sampling
    seed: int
    edit_weights: tuple[Weights, ...] = ()

    def run(self) -> dict[str, Any]:
        """Scores both decoders on the same items of every task.

        Writes `answers/NAME.json` with the answers and scores of each item, from which an interrupted
        measurement goes on, and `per_document.json`.

        Returns:
            `tasks`: {decoder: {task: {score: {"accuracy", "ci95", "n"}}}}, a score is of the scene task;
            `guidance`: {edit: {weights: {score: ..}}}; `over_reliance`: {decoder: {figure: ..}};
            `claims`, see `judge_tuning`. The second and third only where their tasks are measured.
        """
        values: dict[str, Scores] = {}
        summary: dict[str, dict[str, Any]] = {UNTUNED: {}, TUNED: {}}
        (self.stage_dir / FOLDER).mkdir(exist_ok=True)
        edits = [task for task in self.chosen if task.name in edit_guidance.EDITS]
        total = 2 * len(self.chosen) + len(edits) * len(self.edit_weights)
        with progress.track("tasks", total=total) as bar:
            for decoder, folder in ((UNTUNED, self.start), (TUNED, self.stage_dir)):
                load = partial(train_decoder.load_params, folder, self.scenes.image_tokenizer)
                scorer = TaskScorer(self.scenes, load, self.sampling, self.seed)
                for task in self.chosen:
                    name = scored_name(decoder, task.name)
                    asked = lambda scorer=scorer, task=task: scorer.ask(task)
                    values[name] = self._score(name, scorer, asked)
                    summary[decoder][task.name] = _accuracies(values[name])
                    bar.update(len(values))
            result: dict[str, Any] = {"tasks": summary}
            if edits and self.edit_weights:
                result["guidance"] = {}
                for task in edits:
                    result["guidance"][task.name] = self._guide(scorer, task, values)
                    bar.update(len(values))
        if (copied := self._over_rely(scorer, values)) is not None:
            result["over_reliance"] = copied
        claims = judge_tuning.claims(values, self.edit_weights)
        files.write_json(self.stage_dir / PER_DOCUMENT, {SPLIT: values})
        return result | {"claims": [dataclasses.asdict(claim) for claim in claims]}

    def _score(
        self,
        name: str,
        scorer: TaskScorer,
        ask: Callable[[], AskedTask],
        steering: tasks.Steering | None = None,
    ) -> Scores:
        """The scores of a task, and its file, unless an interrupted measurement has written it."""
        path = self.stage_dir / FOLDER / f"{name}.json"
        if not path.exists():
            asked = ask()
            answers = scorer.answer(asked, steering)
            content = {"scores": scorer.score(asked, answers), "answers": answers}
            files.write_atomic(path, files.canonical_json(content).encode())
        return {
            key: list(map(float, own)) for key, own in read_scores(self.stage_dir, name).items()
        }

    def _guide(
        self, scorer: TaskScorer, task: InstructionTask, values: dict[str, Scores]
    ) -> dict[str, Any]:
        """Draws an edit with all weights; adds its scores to `values`."""
        asked: list[AskedTask] = []

        def ask() -> AskedTask:
            if not asked:
                asked.append(scorer.ask(task))
            return asked[0]

        summary = {}
        for weights in self.edit_weights:
            name = edit_guidance.name(task.name, weights)
            if weights == edit_guidance.PLAIN:
                values[name] = values[scored_name(TUNED, task.name)]
            else:
                values[name] = self._score(name, scorer, ask, edit_guidance.steering(weights))
            summary[name] = _accuracies(values[name])
        return summary

    def _over_rely(self, scorer: TaskScorer, values: dict[str, Scores]) -> dict[str, Any] | None:
        """What pictures have from documents against their captions; adds its values per scene.

        None where text to image is not measured, or the documents' facts are not known.
        """
        run = self.scenes.run
        task = scene_instructions.find(scene_instructions.TEXT_TO_IMAGE)
        if task not in self.chosen or given_memory.read(run.workdir / "memory") is not None:
            return None
        asked, summary = scorer.ask(task), {}
        for decoder in (UNTUNED, TUNED):
            answers = read_answers(self.stage_dir, scored_name(decoder, task.name))
            copied = self._copied(asked, np.array(answers, np.int32))
            summary[decoder] = over_reliance.accuracies(copied)
            values[copied_name(decoder)] = {
                key: own.tolist() for key, own in over_reliance.per_document(copied).items()
            }
        return summary

    def _copied(self, asked: AskedTask, codes: np.ndarray) -> dict[str, over_reliance.Copied]:
        scenes = self.scenes
        items = [each.task_item for each in asked.items]
        levels = [item.level for item in items]
        facts = find_neighbors.memory_facts(scenes.world)
        return over_reliance.measure(
            scene_facts.read(scenes.image_tokenizer.decode(codes), levels),
            [item.facts[0] for item in items],
            [[facts[row] for row in rows[rows >= 0]] for rows in asked.hits],
            levels[0],
            codes,
            [[doc.codes for doc in each.docs] for each in asked.instructions],
        )


def _accuracies(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {key: statistics.accuracy(each, key) for key, each in scores.items()}
