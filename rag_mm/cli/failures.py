"""Errors of libraries that say, each in its own way, what the user can mend: a full disk, no device."""

import errno
import os
import re
import traceback

_CUT_SHORT = re.compile(r"\d requested and \d+ written")


def why_disk_refuses(error: BaseException | None) -> str | None:
    """The sentence for a full disk, quota or size limit, if that is what an error comes from; else None.

    Libraries in C++ raise other types than OSError, with the system's words in their text; NumPy says only
    how much it wrote.
    """
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(number)
            if getattr(error, "errno", None) == number or reason in str(error):
                name = getattr(error, "filename", None)
                return f"{reason}." if name is None else f"{os.fsdecode(name)}: {reason}."
        if isinstance(error, OSError) and _CUT_SHORT.search(str(error)):
            return "The disk is full, or a limit of file sizes is reached."
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def why_no_device(error: BaseException) -> str | None:
    """The sentence for devices that JAX_PLATFORMS names and jax does not find; None for another error."""
    platforms = os.environ.get("JAX_PLATFORMS")
    frames = traceback.extract_tb(error.__traceback__)
    # For `cuda` without its plugin it is an AssertionError without a message.
    if not platforms or not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return None
    return f"jax finds no device for JAX_PLATFORMS={platforms}; unset it or install what it names."
