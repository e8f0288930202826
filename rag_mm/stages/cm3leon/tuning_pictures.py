"""Pictures of the page about instruction tuning: what was given, wanted and drawn, and answers in words."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from rag_mm.data import instruction_items, instruction_templates
from rag_mm.report import box_outlines
from rag_mm.report.decoding_page import Frame, PageSection, Strip
from rag_mm.stages.cm3leon import edit_guidance, measure_tuning, scene_instructions
from rag_mm.stages.cm3leon.edit_guidance import Weights
from rag_mm.stages.cm3leon.judge_tuning import TUNED, UNTUNED, scored_name
from rag_mm.stages.cm3leon.measure_tasks import AskedScenes
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask, SceneItem
from rag_mm.stages.shared import build_memory, world_config
from rag_mm.worlds.emoji.emoji_scenes import Facts

_SHOWN = 6  # Items of a task.
_MAX_DOCS = 2
_WITH_BOXES = "draw_boxes"
_DRAWN = {
    "Edits": ("recolor", "move", "swap"),
    "Boxes": (_WITH_BOXES,),
    "Structures": ("from_silhouette", "from_edges"),
    "Text to image": (scene_instructions.TEXT_TO_IMAGE,),
}
_TOLD = ("caption", "what", "where", "which_color", "how_many")
RULE = (
    "The items are evenly spaced among the test scenes, whatever came of them; a green frame means that the "
    "exact scorer finds all right."
)


class ShownItem(NamedTuple):
    """An item of a task.

    Attributes:
        task: the task.
        place: its number among the items of the task.
        made: what is given and wanted.
        hits: memory rows of its documents, best first, -1 for a missing one.
    """

    task: InstructionTask
    place: int
    made: SceneItem
    hits: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TuningPictures:
    """Draws from the files of a finished stage.

    Attributes:
        scenes: what was asked about.
        stage_dir: of the stage.
        names: the tasks that were measured.
    """

    scenes: AskedScenes
    stage_dir: epath.Path
    names: Sequence[str]

    def sections(self) -> list[PageSection]:
        """A section for each family of tasks that was measured."""
        made = []
        for title, names in _DRAWN.items():
            shown = [item for name in names for item in self._shown.get(name, [])]
            strips = [Strip(_worded(item), self._pictures(item)) for item in shown]
            if strips:
                made.append(PageSection(title, RULE, strips=strips))
        answers = [Strip(name, self._told(name)) for name in _TOLD if name in self._shown]
        if answers:
            made.append(PageSection("Answers", RULE, strips=answers))
        return made

    def guided(self, weights: Sequence[Weights]) -> list[Strip]:
        """The first item of each edit with all weights, text weight after image weight."""
        strips = []
        for name in edit_guidance.EDITS if weights else ():
            for item in self._shown.get(name, [])[:1]:
                given = item.made.item
                frames = [Frame(given.given[0], ["before"]), Frame(given.picture, ["wanted"])]
                for pair in weights:
                    scored = edit_guidance.name(name, pair)
                    if pair == edit_guidance.PLAIN:
                        scored = scored_name(TUNED, name)
                    lines = [f"image {pair[0]:g}", f"text {pair[1]:g}"]
                    frames.append(self._drawn(scored, item, lines))
                strips.append(Strip(_worded(item), frames))
        return strips

    def _has(self, name: str) -> bool:
        """Whether there are answers to a task that can be shown."""
        path = self.stage_dir / measure_tuning.FOLDER / f"{scored_name(TUNED, name)}.json"
        return path.exists()

    @functools.cached_property
    def _shown(self) -> dict[str, list[ShownItem]]:
        """The items that are shown, by task."""
        shown = {}
        for name in filter(self._has, self.names):
            task = scene_instructions.find(name)
            items, tested = self.scenes.items(task)
            hits = self.scenes.hits(task, _MAX_DOCS)
            places = world_config.evenly_spaced(np.arange(len(items)), _SHOWN).tolist()
            shown[name] = [ShownItem(task, p, items[p], hits[tested[p]]) for p in places]
        return shown

    def _pictures(self, item: ShownItem) -> list[Frame]:
        """What is given, wanted and drawn."""
        given, task = item.made.item, item.task
        labels = instruction_templates.TEMPLATES[task.name][0].given
        frames = [Frame(*pair) for pair in zip(given.given, ([x] for x in labels), strict=True)]
        for number, row in enumerate(item.hits[item.hits >= 0], start=1):
            frames.append(Frame(self._decode(self._memory_codes[row]), [f"document {number}"]))
        facts = item.made.task_item.facts[0] if task.name == _WITH_BOXES else None
        frames.append(Frame(_boxed(given.picture, facts), ["wanted"]))
        for decoder in (UNTUNED, TUNED):
            frame = self._drawn(scored_name(decoder, task.name), item, [decoder])
            frames.append(dataclasses.replace(frame, image=_boxed(frame.image, facts)))
        return frames

    def _drawn(self, name: str, item: ShownItem, lines: list[str]) -> Frame:
        codes = measure_tuning.read_answers(self.stage_dir, name)[item.place]
        return Frame(self._decode(np.array(codes, np.int32)), lines, self._is_right(name, item))

    def _told(self, name: str) -> list[Frame]:
        """Pictures with what was asked, wanted and answered."""
        frames = []
        for item in self._shown[name]:
            given = item.made.item
            lines = [given.fields["question"]] if "question" in given.fields else []
            lines += [f"wanted: {answer}" for answer in given.answers[:1]]
            for decoder in (UNTUNED, TUNED):
                own = scored_name(decoder, name)
                said = measure_tuning.read_answers(self.stage_dir, own)[item.place]
                lines.append(f"{decoder}: {said or '(nothing)'}")
            frames.append(
                Frame(given.picture, lines, self._is_right(scored_name(TUNED, name), item))
            )
        return frames

    def _is_right(self, name: str, item: ShownItem) -> bool:
        scores = measure_tuning.read_scores(self.stage_dir, name)
        return bool(scores[item.task.figure][item.place])

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        return self.scenes.image_tokenizer.decode(codes[None])[0]

    @functools.cached_property
    def _memory_codes(self) -> np.ndarray:
        codes = build_memory.open_memory(self.scenes.run).codes
        assert codes is not None
        return codes


def _worded(item: ShownItem) -> str:
    """The instruction in its first wording."""
    template = instruction_templates.TEMPLATES[item.task.name][0]
    return instruction_items.fill(template.text, item.made.item.fields)


def _boxed(image: np.ndarray, facts: Facts | None) -> np.ndarray:
    if facts is None:
        return image
    return box_outlines.outline(
        image,
        [(e.column, e.row, e.column + e.size, e.row + e.size) for e in facts.entities],
    )
