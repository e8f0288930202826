"""Opens public instruction data by the name of its layout, as `--documents=LAYOUT:PATH` gives it."""

from collections.abc import Callable, Iterator

from etils import epath

from rag_mm.core.errors import UserError
from rag_mm.data import coco_files, edit_files, vqa_files
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.data.instruction_records import Found
from rag_mm.memory.writing import stream

LAYOUTS: dict[str, Callable[[epath.Path, int], Iterator[Found]]] = {
    "instruct-pix2pix": edit_files.read_edits,
    "controlnet": edit_files.read_feature_maps,
    "coco-captions": coco_files.read_captions,
    "coco-boxes": coco_files.read_boxes,
    "vqav2": vqa_files.read_questions,
}
TASKS = {
    "instruct-pix2pix": "edit",
    "controlnet": "structure",
    "coco-captions": "caption",
    "coco-boxes": "boxes",
    "vqav2": "question",
}
"""The task of the items of each layout."""


class InstructionFiles:
    """The items of a folder in a public layout; pictures are read one by one.

    Attributes:
        rejects: each bad record of the last `read`, so far.
    """

    def __init__(self, spec: str):
        """Takes `LAYOUT:PATH`; nothing is read.

        Raises:
            UserError: there is no such layout or path.
        """
        layout, separator, path = spec.partition(":")
        if not separator or layout not in LAYOUTS:
            raise UserError(
                f"{spec!r} is not LAYOUT:PATH; layouts are {', '.join(LAYOUTS)}, such as vqav2:data/vqa."
            )
        self.layout, self._path = layout, epath.Path(path)
        if not path or not self._path.exists():
            raise UserError(
                f"{path or spec} does not exist; give the folder of the published data."
            )
        self.rejects: list[stream.Reject] = []

    @property
    def task(self) -> str:
        """The task of the items."""
        return TASKS[self.layout]

    def read(self, image_size: int) -> Iterator[InstructionItem]:
        """The good items, with pictures uint8 [S, S, 3], S = `image_size`.

        Raises:
            UserError: a file that describes them is missing or not of the published form.
        """
        self.rejects.clear()
        for found in LAYOUTS[self.layout](self._path, image_size):
            if isinstance(found, stream.Reject):
                self.rejects.append(found)
            else:
                yield found

    def __repr__(self) -> str:
        return f"InstructionFiles({self.layout}:{self._path})"
