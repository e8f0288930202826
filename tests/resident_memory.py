"""Keeps the memory of each test process small, prints the peak, and fails a session that exceeds the limit.

jax keeps every compiled program until its caches are cleared: over the fast tests, several GiB.
"""

import ctypes
import gc
import pathlib
import re

import jax
import pytest

LIMIT_GIB = 3.0  # Of one process of a session without slow tests.
CLEAR_ABOVE_GIB = 1.5
_peaks_gib = [0.0]  # One per test, because tests of the benchmarks reset the peak in /proc.
_KEY, _IS_LIMITED = "peak_gib", pytest.StashKey[bool]()


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


def pytest_configure(config: pytest.Config) -> None:
    """Slow tests have no limit; the process that only hands tests out to others collects none itself."""
    config.stash[_IS_LIMITED] = config.option.markexpr == "not slow and not parity"


def pytest_runtest_logfinish() -> None:
    _peaks_gib.append(_gib("VmHWM"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A worker of pytest-xdist has ended."""
    _peaks_gib.append(getattr(node, "workeroutput", {}).get(_KEY, 0.0))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_KEY] = max(_peaks_gib)
    if _is_exceeded(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    is_exceeded = _is_exceeded(config)
    limit = f", more than the limit of {LIMIT_GIB:g} GiB: FAILED" if is_exceeded else ""
    line = f"Peak memory of a test process: {max(_peaks_gib):.2f} GiB{limit}"
    terminalreporter.write_line(line, red=is_exceeded)


def _is_exceeded(config: pytest.Config) -> bool:
    return config.stash[_IS_LIMITED] and max(_peaks_gib) > LIMIT_GIB
