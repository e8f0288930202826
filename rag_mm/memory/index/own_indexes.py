"""Which saved indexes this user built: a native library reads no others.

ScaNN trusts its files: damaged ones end the process, and a memory's digests are its author's own. So the
digest of each index that this user saves is recorded, as the name of an empty file in the user's cache folder
(`core.user_cache`); an index without a record is built anew from its rows.
"""

import contextlib
from pathlib import Path

from rag_mm.core import files, user_cache

_FOLDER = "indexes"


def record(description: Path) -> None:
    """Records the index that a file describes as this user's; without a cache folder nothing is recorded."""
    folder = user_cache.folder(_FOLDER)
    if folder is not None:
        # On a full disk it is not recorded, and the index built anew when it is loaded.
        with contextlib.suppress(OSError):
            (folder / files.file_digest(description)).touch(mode=0o600)


def is_own(description: Path) -> bool:
    """Whether this user saved the index that a file describes, with the digests of its other files."""
    folder = user_cache.folder(_FOLDER)
    return folder is not None and (folder / files.file_digest(description)).is_file()
