"""Scores of the suites of `rag-mm eval` about instructions."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_mm.core import run_folder
from rag_mm.data import vqa_files
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.eval import cider, edit_agreement, statistics, vqa_accuracy
from rag_mm.stages.cm3leon import scene_instructions
from rag_mm.stages.shared import train_retriever
from rag_mm.worlds.emoji import scene_tasks
from rag_mm.worlds.emoji.scene_tasks import Output, TaskItem

Asked = tuple[InstructionItem, TaskItem | None]  # The latter, with exact facts, of scenes.


def score(
    suite: str, found: Sequence[Asked], outputs: Sequence[Output], run: run_folder.Run
) -> dict[str, Any]:
    """The figures of a suite, see `instruction_suites.evaluate`.

    Args:
        suite: its name.
        found: what was asked, at least two.
        outputs: what was answered to each.
        run: whose retriever compares pictures without exact facts.
    """
    exact = _exact(found, outputs)
    if suite == "vqa":
        values = [float(scores["right"]) for scores in exact] or [
            vqa_accuracy.accuracy(scene_tasks.text_of(output), item.answers)
            for (item, _), output in zip(found, outputs, strict=True)
        ]
        key = "task" if exact else vqa_files.TYPES[1]
        kinds = [item.task if exact else item.fields.get(key, "") for item, _ in found]
        groups = collections.defaultdict(list)
        for kind, value in zip(kinds, values, strict=True):
            groups[kind].append(value)
        by_kind = {kind: float(np.mean(own)) for kind, own in groups.items() if kind}
        return {**_accuracy(values), f"by_{key}": by_kind}
    if suite == "caption":
        texts = [scene_tasks.text_of(output) for output in outputs]
        scores = cider.cider(texts, [item.answers for item, _ in found])
        right = [float(each["right"]) for each in exact]
        return {"cider": statistics.mean(scores)} | ({"right": _accuracy(right)} if exact else {})
    if exact:
        return {key: _accuracy([float(each[key]) for each in exact]) for key in exact[0]}
    return _pictures(suite, [item for item, _ in found], outputs, run)


def _pictures(
    suite: str, items: Sequence[InstructionItem], outputs: Sequence[Output], run: run_folder.Run
) -> dict[str, Any]:
    """How drawn pictures agree with the published ones, by the run's retriever."""
    encode = train_retriever.load_encoder(run.workdir).encode_image
    drawn = encode(np.stack([scene_tasks.images_of(output)[0] for output in outputs]))
    target = encode(np.stack([item.picture for item in items]))
    if suite != "edit":
        return {"similarity": statistics.mean((drawn * target).sum(axis=1))}
    source = encode(np.stack([item.given[0] for item in items]))
    agreement = edit_agreement.agreement(drawn, source, target)
    return {key: statistics.mean(values) for key, values in agreement.items()}


def _exact(found: Sequence[Asked], outputs: Sequence[Output]) -> list[scene_tasks.Scores]:
    """The scores of scene tasks, in order; none for other items."""
    by_task = collections.defaultdict(list)
    for place, ((item, task_item), output) in enumerate(zip(found, outputs, strict=True)):
        if task_item is not None:
            by_task[item.task].append((place, task_item, output))
    scores: dict[int, scene_tasks.Scores] = {}
    for name, own in by_task.items():
        places, asked, drawn = zip(*own, strict=True)
        task = scene_instructions.TASKS[name].scene_task
        scores |= zip(places, task.score(asked, drawn), strict=True)
    return [scores[place] for place in sorted(scores)]


def _accuracy(values: Sequence[float]) -> dict[str, float | int]:
    """{"accuracy", "ci95", "n"}; consensus accuracies may lie between 0 and 1."""
    if set(values) <= {0.0, 1.0}:
        return statistics.accuracy(values)
    found = statistics.mean(values)
    return {"accuracy": found["mean"], "ci95": found["ci95"], "n": found["n"]}
