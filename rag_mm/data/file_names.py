"""Names of strangers' files: which are no samples, and which id a document gets from its file's name."""

import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# A Mac's and Windows' own files; `__meta__` and the like are WebDataset's.
_SYSTEM_FILES = re.compile(r"\..*|thumbs\.db|desktop\.ini|icon\r", re.IGNORECASE)
_SYSTEM_FOLDERS = re.compile(r"__MACOSX|@eaDir|__[^/]+__")
_ABOUT_NAMES = (
    "readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation",
    "metadata", "info", "dataset_info", "dataset_infos", "stats", "index", "checksums",
)  # fmt: skip
_ABOUT_ENDINGS = (
    "", "md", "rst", "html", "pdf", "csv", "tsv", "jsonl", "parquet", "yaml", "yml", "toml", "xml",
    "bib", "log", "py", "sh", "idx", "md5", "sha1", "sha256",
)  # fmt: skip


def is_system_file(path: str) -> bool:
    """Whether a system left the file beside the user's, such as `._0.jpg` and `__MACOSX/0.jpg`."""
    *folders, name = pathlib.PurePosixPath(path).parts or ("",)
    return bool(_SYSTEM_FILES.fullmatch(name) and name != "..") or any(
        _SYSTEM_FOLDERS.fullmatch(folder) for folder in folders
    )


def is_about_samples(path: str) -> bool:
    """Whether a file that comes without an image is about the samples (README, tables) and none itself."""
    name, _, ending = pathlib.PurePosixPath(path).name.lower().partition(".")
    return ending in _ABOUT_ENDINGS or name in _ABOUT_NAMES


def ids_of_paths(paths: Iterable[str]) -> list[str]:
    """A document's id for each image file, in composed form (NFC).

    It is the file's path without its ending: `cat/0.png` is `cat/0`. Where an earlier path has that id, such
    as `0.png` before `0.webp`, it is the whole path; the same path again has the same id again.

    Args:
        paths: relative to the folder of the documents.
    """
    owners: dict[str, str] = {}
    ids = []
    for path in paths:
        whole = unicodedata.normalize("NFC", pathlib.PurePosixPath(path).as_posix())
        short = str(pathlib.PurePosixPath(whole).with_suffix("")) if whole != "." else ""
        ids.append(short if owners.setdefault(short, whole) == whole else whole)
    return ids


def prefixes_of_shards(paths: Sequence[pathlib.Path]) -> list[str]:
    """What precedes the keys of each tar in ids: of several tars, their path without ending, and `/`.

    Keys often count from 0 in every tar. Paths are relative to the folder that holds all tars.
    """
    if len(paths) == 1:
        return [""]
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    names = (path.absolute().relative_to(folder).with_suffix("").as_posix() for path in paths)
    return [unicodedata.normalize("NFC", name) + "/" for name in names]
