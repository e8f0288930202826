"""What a command's `--documents` may name, and the source that it means."""

import pathlib
import re

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, sources, webdataset
from rag_mm.memory.writing import stream

TFDS = "tfds:"
# A slice has a colon too, as in train[:100].
_TFDS_SPEC = re.compile(r"(.+?):(\w+(?:\[[^\]]*\])?)")


def open_documents(spec: str) -> stream.RecordStream:
    """The source that a text names.

    Args:
        spec: a folder of pictures with captions.jsonl, of WebDataset tars, of ArrayRecord files or
            of a TFDS dataset in ArrayRecord form; a tar or ArrayRecord file; or
            `tfds:NAME:SPLIT`, with NAME as TFDS has it or a folder.

    Raises:
        UserError: it names nothing that can be read.
    """
    if spec.startswith(TFDS):
        match = _TFDS_SPEC.fullmatch(spec.removeprefix(TFDS))
        if match is None:
            raise UserError(f"{spec} names no split: write tfds:NAME:SPLIT.")
        return array_records.TfdsSource(match[1], match[2])
    path = pathlib.Path(spec)
    if path.is_file() and path.suffix == ".tar":
        return webdataset.TarSource([path])
    if path.is_file() and path.suffix == ".arrayrecord":
        return array_records.RecordSource([path])
    if not (path / sources.CAPTIONS).exists() and path.is_dir():
        if tars := sorted(path.glob("*.tar")):
            return webdataset.TarSource(tars)
        if records := sorted(path.glob("*.arrayrecord")):
            return array_records.RecordSource(records)
        if (path / "dataset_info.json").exists():
            raise UserError(f"{spec} is a TFDS dataset: write tfds:{spec}:SPLIT.")
    return sources.FolderSource(spec)
