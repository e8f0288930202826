"""Runs the programs of the `programs/` folders next to the tests, each in a new Python process."""

import json
import os
import pathlib
import subprocess
import sys

import rag_mm

ROOT = pathlib.Path(rag_mm.__file__).parents[1]
TESTS = pathlib.Path(__file__).parent
PROGRAMS = TESTS / "programs"


def environment(*folders: pathlib.Path) -> dict[str, str]:
    """This process' environment, with `folders`, tests/ and this checkout as its PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, TESTS, ROOT]))}


def run(
    program: pathlib.Path, *arguments, path: tuple[pathlib.Path, ...] = (), **options
) -> subprocess.CompletedProcess:
    """`python PROGRAM ARGUMENTS...` to its end, in this checkout; its exit code is not checked.

    Args:
        path: folders that come first on the program's PYTHONPATH.
        options: of `subprocess.run`, in place of the defaults here.
    """
    command = [sys.executable, str(program), *map(str, arguments)]
    defaults = dict(cwd=ROOT, env=environment(*path), capture_output=True, text=True, check=False)
    return subprocess.run(command, **{**defaults, **options})


def modules_loaded_by(*modules: str) -> set[str]:
    """Top-level modules that a new process has loaded after importing `modules`, which print nothing."""
    done = run(PROGRAMS / "loaded_modules.py", *modules)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return set(json.loads(done.stdout))
