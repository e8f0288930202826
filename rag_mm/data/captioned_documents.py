"""Documents of any source as pictures to caption: what a memory is built from, or `coco-captions:DIR`."""

from collections.abc import Collection, Iterator

from rag_mm.core import image_files
from rag_mm.data import instruction_files, open_documents
from rag_mm.data.instruction_items import ANSWER, InstructionItem
from rag_mm.memory.writing import stream


class CaptionedDocuments:
    """The first picture of each document, with its texts, joined, as its only reference.

    Documents without a picture or without a text are passed over.

    Attributes:
        rejects: each bad record of the last `read`, so far.
    """

    task = "caption"

    def __init__(self, source: stream.Documents | stream.RecordStream):
        self._source = stream.as_source(source)
        self.rejects: list[stream.Reject] = []

    def read(self, image_size: int) -> Iterator[InstructionItem]:
        """The items, with pictures uint8 [S, S, 3], S = `image_size`."""
        self.rejects.clear()
        for item in self._source.read(0):
            document = item.document
            if item.reject is not None:
                self.rejects.append(item.reject)
            elif document is not None and document.image is not None and document.text.strip():
                picture, text = image_files.fit(document.image, image_size), document.text
                fields = {ANSWER: text}
                yield InstructionItem(document.id, self.task, fields, picture, answers=(text,))


def open_items(
    spec: str, tasks: Collection[str]
) -> CaptionedDocuments | instruction_files.InstructionFiles:
    """Opens what a suite asks; the `task` of the result may be another than it does.

    Args:
        spec: `LAYOUT:PATH` of `instruction_files.LAYOUTS`, or, where `caption` is among the tasks, a source
            as of `open_documents`, such as a folder with captions.jsonl.
        tasks: those of the suite.

    Raises:
        UserError: there is no such path or source.
    """
    is_layout = spec.partition(":")[0] in instruction_files.LAYOUTS
    if is_layout or CaptionedDocuments.task not in tasks:
        return instruction_files.InstructionFiles(spec)
    return CaptionedDocuments(open_documents.open_documents(spec))
