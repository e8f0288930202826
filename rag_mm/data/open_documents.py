"""Opens the document source named by a command's `--documents`."""

import pathlib
import re

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, sources, webdataset
from rag_mm.memory.writing import stream

TFDS = "tfds:"
# A slice such as train[:100] also contains a colon.
_TFDS_SPEC = re.compile(r"(.+?):(\w+(?:\[[^\]]*\])?)")


def open_documents(spec: str) -> stream.RecordStream:
    """Opens a document source.

    Args:
        spec: a folder of images with captions.jsonl, of WebDataset tars or of ArrayRecord files; a single
            tar or ArrayRecord file; or `tfds:NAME:SPLIT` for a TFDS dataset in ArrayRecord format, where
            NAME is a TFDS name or a folder.

    Raises:
        UserError: `spec` names nothing that can be read.
    """
    if spec.startswith(TFDS):
        match = _TFDS_SPEC.fullmatch(spec.removeprefix(TFDS))
        if match is None:
            raise UserError(f"{spec} has no split: write tfds:NAME:SPLIT.")
        return array_records.TfdsSource(match[1], match[2])
    path = pathlib.Path(spec)
    if path.is_file() and path.suffix == ".tar":
        return webdataset.TarSource([path])
    if path.is_file() and path.suffix == ".arrayrecord":
        return array_records.ArrayRecordSource([path])
    if not (path / sources.CAPTIONS).exists() and path.is_dir():
        if tars := sorted(path.glob("*.tar")):
            return webdataset.TarSource(tars)
        if records := sorted(path.glob("*.arrayrecord")):
            return array_records.ArrayRecordSource(records)
        if (path / "dataset_info.json").exists():
            raise UserError(f"{spec} is a TFDS dataset: write tfds:{spec}:SPLIT.")
    return sources.FolderSource(spec)
