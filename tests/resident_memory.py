"""Keeps the memory of the pytest process small, prints its peak, and fails a session that exceeds the limit.

jax keeps every compiled program until its caches are cleared: over the fast tests, several GiB.
"""

import ctypes
import gc
import pathlib
import re

import jax
import pytest

LIMIT_GIB = 3.0  # Of a session without slow tests.
CLEAR_ABOVE_GIB = 1.5
_IS_EXCEEDED = pytest.StashKey[bool]()
_peaks_gib = [0.0]  # One per test, because tests of the benchmarks reset the peak in /proc.


def _gib(field: str) -> float:
    """A size in /proc/self/status: VmRSS now, VmHWM at the peak; 0 where there is no such file."""
    path = pathlib.Path("/proc/self/status")
    match = re.search(rf"{field}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(match[1]) / 2**20 if match else 0.0


@pytest.fixture(autouse=True, scope="module")
def _clear_compiled_programs():
    """After a module that leaves much memory in use; the compilation cache on disk remains."""
    yield
    if _gib("VmRSS") > CLEAR_ABOVE_GIB:
        jax.clear_caches()
        gc.collect()
        # glibc keeps freed memory unless it is asked to return it; other C libraries have no such call.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


def pytest_runtest_logfinish() -> None:
    _peaks_gib.append(_gib("VmHWM"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    unlimited = ("slow", "parity")
    is_limited = not any(
        item.get_closest_marker(name) for item in session.items for name in unlimited
    )
    is_exceeded = is_limited and max(_peaks_gib) > LIMIT_GIB
    session.config.stash[_IS_EXCEEDED] = is_exceeded
    if is_exceeded and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    is_exceeded = config.stash.get(_IS_EXCEEDED, False)
    limit = f", more than the limit of {LIMIT_GIB:g} GiB: FAILED" if is_exceeded else ""
    line = f"Peak memory of the pytest process: {max(_peaks_gib):.2f} GiB{limit}"
    terminalreporter.write_line(line, red=is_exceeded)
