"""Opens the document source named by a command's `--documents`."""

import json
import pathlib
import re

from etils import epath

from rag_mm.core import digests, files
from rag_mm.core.errors import UserError
from rag_mm.data import array_records, file_names, parquet_files, sources, webdataset
from rag_mm.memory.writing import stream

TFDS = "tfds:"
TAR, ARRAY_RECORD, PARQUET = ".tar", ".arrayrecord", ".parquet"
_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|zip|7z|rar|tar\.\w+)$", re.IGNORECASE)
# A slice such as train[:100] also contains a colon.
_TFDS_SPEC = re.compile(r"(.+?):(\w+(?:\[[^\]]*\])?)")


def open_documents(spec: str) -> stream.RecordStream:
    """Opens a document source.

    Args:
        spec: a folder of images with captions.jsonl, of WebDataset tars, of ArrayRecord or of Parquet files;
            a single tar, ArrayRecord or Parquet file; or `tfds:NAME:SPLIT` for a TFDS dataset in ArrayRecord
            format, where NAME is a TFDS name or a folder.

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
        if tables := _with_ending(path, PARQUET):
            return parquet_files.ParquetSource(tables)
        if (path / "dataset_info.json").exists():
            raise UserError(f"{spec} is a TFDS dataset: write tfds:{spec}:SPLIT.")
        if packed := next(filter(_is_packed, sorted(path.iterdir())), None):
            raise _packed(packed)
    return sources.FolderSource(spec)


def digest(spec: str) -> str:
    """A digest of the content of a document source; for tar files, of names and sizes.

    A process hashes files once, unless they change.

    Raises:
        UserError: as `open_documents`.
    """
    return digests.of_files(spec, _digest)


def _digest(path: epath.Path) -> str:
    # The fingerprint of a folder covers its captions only.
    pixels = digests.folder_digests(path) if path.is_dir() else {}
    source = open_documents(str(path))
    return files.digest(json.dumps([source.fingerprint, pixels], sort_keys=True).encode())


def _open_file(path: pathlib.Path) -> stream.RecordStream:
    if path.suffix.lower() == TAR:
        return webdataset.TarSource([path])
    if path.suffix.lower() == ARRAY_RECORD:
        return array_records.ArrayRecordSource([path])
    if path.suffix.lower() == PARQUET:
        return parquet_files.ParquetSource([path])
    if _is_packed(path):
        raise _packed(path)
    raise UserError(
        f"{path} is neither a tar, an ArrayRecord nor a Parquet file; name one, or a folder of images with a "
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
