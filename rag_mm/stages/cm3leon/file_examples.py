"""The examples that a decoder is tuned on from public instruction data, beside those of scenes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rag_mm.core import progress
from rag_mm.core.errors import UserError
from rag_mm.data.instruction_files import InstructionFiles
from rag_mm.data.instruction_items import CodedItem
from rag_mm.stages.cm3leon import instruction_sequences
from rag_mm.stages.shared import frozen


class FileExamples(NamedTuple):
    """The good items of a folder, and how many records were bad."""

    items: list[CodedItem]
    num_rejected: int


def read(
    specs: Sequence[str], image_tokenizer: frozen.FrozenTokenizer, max_docs: int
) -> dict[str, FileExamples]:
    """The items of each `LAYOUT:PATH`, with codes for pixels.

    Args:
        specs: see `instruction_files`; each once.
        image_tokenizer: makes the codes.
        max_docs: documents that the decoder reads before the main one, given pictures among them.

    Raises:
        UserError: a folder has no good item, is not of its layout, or gives more pictures than the decoder
            reads.
    """
    found = {}
    with progress.track("files", total=len(specs)) as bar:
        for spec in specs:
            source, size = InstructionFiles(spec), image_tokenizer.image_size
            items = instruction_sequences.encode(source.read(size), image_tokenizer.encode, size)
            found[spec] = FileExamples(list(items), len(source.rejects))
            _check(spec, found[spec], source, max_docs)
            bar.update(len(found))
    return found


def _check(spec: str, found: FileExamples, source: InstructionFiles, max_docs: int) -> None:
    if not found.items:
        first = source.rejects[:1]
        why = f"; the first bad one is {first[0].name}: {first[0].detail}" if first else ""
        raise UserError(f"{spec} has no good item to tune on{why}")
    num_given = len(found.items[0].given)
    if num_given > max_docs:
        raise UserError(
            f"{spec} puts {num_given} pictures before the main one, but the decoder reads at most "
            f"{max_docs}; train one that reads more, or leave it out."
        )


def counts(found: Mapping[str, FileExamples]) -> dict[str, dict[str, int]]:
    """Good items and bad records by `LAYOUT:PATH`."""
    return {
        spec: {"items": len(each.items), "rejected": each.num_rejected}
        for spec, each in found.items()
    }
