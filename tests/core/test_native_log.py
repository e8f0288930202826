"""Only Abseil's INFO lines are dropped; all else that is written to stderr meanwhile arrives."""

import os

from rag_mm.core import native_log


def test_only_the_noise_is_dropped(capfd):
    lines = (
        b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
        b"I0000 00:00:1796026583.585862   30470 factory.h:178] AH training, 2 thread(s).\n",
        b"W0000 00:00:1796026583.585863   30470 factory.h:179] Few rows.\n",
        b"In the progress bar's words: I0000 00:00: is a name.\n",
    )
    with native_log.dropped():
        for line in lines:
            os.write(2, line)
    os.write(2, b"After.\n")
    assert capfd.readouterr().err.encode() == lines[2] + lines[3] + b"After.\n"


def test_an_exception_passes_and_stderr_is_back(capfd):
    try:
        with native_log.dropped():
            os.write(2, b"Why it failed.\n")
            raise RuntimeError
    except RuntimeError:
        os.write(2, b"Caught.\n")
    assert capfd.readouterr().err == "Why it failed.\nCaught.\n"
