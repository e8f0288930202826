"""Tests run on eight simulated CPU devices, with strict dtypes and ranks, and share compiled programs."""

import dataclasses
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
    folder, name = tmp_path_factory.mktemp("tiny"), "run #1 50%20? [0:3] é"
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
    return Finished(folder / name, done.stdout, done.stderr)
