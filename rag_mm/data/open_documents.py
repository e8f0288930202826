"""Opens the document source named by a command's `--documents`."""

import pathlib
import re

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, file_names, sources, webdataset
from rag_mm.memory.writing import stream

TFDS = "tfds:"
TAR, ARRAY_RECORD = ".tar", ".arrayrecord"
_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|zip|7z|rar|tar\.\w+)$", re.IGNORECASE)
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
    if path.is_file():
        return _open_file(path)
    if not (path / sources.CAPTIONS).exists() and path.is_dir():
        if tars := _with_ending(path, TAR):
            return webdataset.TarSource(tars)
        if records := _with_ending(path, ARRAY_RECORD):
            return array_records.ArrayRecordSource(records)
        if (path / "dataset_info.json").exists():
            raise UserError(f"{spec} is a TFDS dataset: write tfds:{spec}:SPLIT.")
        if packed := next(filter(_is_packed, sorted(path.iterdir())), None):
            raise _packed(packed)
    return sources.FolderSource(spec)


def _open_file(path: pathlib.Path) -> stream.RecordStream:
    if path.suffix.lower() == TAR:
        return webdataset.TarSource([path])
    if path.suffix.lower() == ARRAY_RECORD:
        return array_records.ArrayRecordSource([path])
    if _is_packed(path):
        raise _packed(path)
    raise UserError(
        f"{path} is neither a tar nor an ArrayRecord file; name one, or a folder of images with a "
        f"{sources.CAPTIONS}."
    )


def _with_ending(folder: pathlib.Path, ending: str) -> list[pathlib.Path]:
    """A folder's files with an ending in any case, in order of their names."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() == ending and not file_names.is_system_file(path.name)
    ]


def _is_packed(path: pathlib.Path) -> bool:
    return _PACKED.search(path.name) is not None


def _packed(path: pathlib.Path) -> UserError:
    return UserError(f"{path} is compressed, which is not read; decompress it to a .tar first.")
