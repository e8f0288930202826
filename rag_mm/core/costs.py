"""What a stage cost: wall time over all its parts, peak memory, code version and machine."""

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError

FILE_NAME = "times.json"
# Step times of a training stage, its profile, and TensorBoard events (which contain times too).
SPEED_NAME = "speed.jsonl"
PROFILE_NAME = "profile"
BOARD_NAME = "tensorboard"
TRACKER_NAME = "tracker.json"  # the stage's run in an experiment tracker
# `times.json` is updated this often, so a killed part is counted up to its last update.
_UPDATE_SECONDS = 5.0


@contextlib.contextmanager
def timed(stage_dir: epath.Path) -> Iterator[None]:
    """Adds one part (one start of the stage) to `stage_dir/times.json`, updated while the body runs.

    The manifest leaves this file out: it may differ between two bitwise identical runs.
    """
    parts = read(stage_dir)["parts"]
    start = time.monotonic()

    def update() -> None:
        part = {
            "wall_seconds": round(time.monotonic() - start, 2),
            "peak_rss_mb": _peak_rss_mb(),
            "code": code_version(),
            "machine": machine(),
        }
        files.write_json(stage_dir / FILE_NAME, {"parts": [*parts, part]})

    def keep_updating() -> None:
        while not stopped.wait(_UPDATE_SECONDS):
            with contextlib.suppress(Exception):  # Errors such as a full disk are left to the body.
                update()

    update()
    stopped = threading.Event()
    thread = threading.Thread(target=keep_updating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
    update()


def read(stage_dir: epath.Path) -> dict[str, Any]:
    """The content of `times.json`: `parts`, one for each time the stage was started; empty if never.

    The file only tells what a stage cost, so a damaged one stops nothing: parts that cannot be read are left
    out.
    """
    path = stage_dir / FILE_NAME
    try:
        parts = files.read_object(path, parts=list)["parts"] if path.exists() else []
    except UserError:
        parts = []
    return {"parts": [part for part in parts if _is_part(part)]}


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and all(
        isinstance(part.get(key), int | float) for key in ("wall_seconds", "peak_rss_mb")
    )


def mark_reused(stage_dir: epath.Path) -> None:
    """Marks all parts so far as spent by another run (key `borrowed`)."""
    parts = [{**part, "borrowed": True} for part in read(stage_dir)["parts"]]
    files.write_json(stage_dir / FILE_NAME, {"parts": parts})


def summary(stage_dir: epath.Path) -> dict[str, Any]:
    """Total wall seconds, largest peak RSS in MiB, number of parts, and the last part's machine.

    `borrowed_seconds` is the share of the total that another run spent, for reused stages.
    """
    parts = read(stage_dir)["parts"]
    borrowed = [part["wall_seconds"] for part in parts if part.get("borrowed")]
    return {
        "wall_seconds": round(sum(part["wall_seconds"] for part in parts), 2),
        "borrowed_seconds": round(sum(borrowed), 2),
        "peak_rss_mb": max((part["peak_rss_mb"] for part in parts), default=0),
        "parts": len(parts),
        "code": parts[-1].get("code") if parts else None,
        "machine": parts[-1].get("machine") if parts else None,
    }


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores, system, and the library versions that results depend on."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@functools.cache
def code_version() -> str:
    """The package's version; in a git checkout with the commit (`-dirty` if edited)."""
    import rag_mm

    root = pathlib.Path(rag_mm.__file__).parent.parent
    if not (root / ".git").exists():
        return rag_mm.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return rag_mm.__version__
    return f"{rag_mm.__version__}+{commit.stdout.strip()}"


def _peak_rss_mb() -> int:
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
