"""Tests run on eight simulated CPU devices, with strict dtypes and ranks, and share compiled programs."""

import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent
# Before jax is imported; commands that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Most of the time of a test goes into compiling, which takes half as long without costly optimizations.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import hypothesis
import jax
import jaxtyping
import pytest

# Shared machines are slow at times, and a push must not fail by the luck of the draw.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before rag_mm is imported. Outside of tests nothing is checked.
CHECKED = ["rag_mm.ops", "rag_mm.nn", "rag_mm.models", "rag_mm.decode"]
jaxtyping.install_import_hook(CHECKED, "shape_checks.check")

pytest_plugins = ["resident_memory"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that ran to its end, and the run it left."""

    workdir: pathlib.Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Finished:
    """`quickstart:tiny` through the real command, once for all tests: copy it before you change it.

    The folder's name holds what URLs, patterns of files and shells would read as something else.
    """
    name = "run #1 50%20? [0:3] é"
    # Workers of pytest-xdist have a folder each, inside a common one.
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "tiny"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "stderr").exists():
            _quickstart_tiny(folder, name)
    return Finished(folder / name, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def _quickstart_tiny(folder: pathlib.Path, name: str) -> None:
    command = [pathlib.Path(sys.executable).with_name("rag-mm"), "quickstart", f"--workdir={name}"]
    done = subprocess.run(
        [*command, "--config=configs/quickstart.py:tiny"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
