"""`rag-mm doctor`: checks versions, imports, devices, flags and disk space, and lists problems."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

import rich.console
import rich.table
from PIL import features

import rag_mm
from rag_mm.core import costs, errors

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "array-record",
    "tensorflow-datasets", "scann", "clu", "ml-collections", "numpy", "pillow", "tokenizers",
    "tensorflow", "tensorflow-cpu", "torch", "transformers",
)  # fmt: skip
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
LOW_DISK_GB = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--workdir`, whose disk is checked."""
    parser.add_argument("--workdir", default=".", help="folder whose disk is checked (default: .)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every check. Returns the facts, `problems` as sentences with remedies, and `ok`: no problems."""
    workdir = pathlib.Path(args.workdir)
    if not workdir.is_dir():
        raise errors.UserError(f"{args.workdir} is not a folder.")
    devices = _devices()
    scann = _scann()
    free_gb = round(shutil.disk_usage(workdir).free / 1e9, 1)
    versions = {name: _version(name) for name in PACKAGES}
    problems = [*_version_problems(versions), *devices.pop("problems"), *_import_problems()]
    if versions["scann"] and scann != "loads":
        problems.append(f"ScaNN {scann}; use the exact index.")
    if free_gb < LOW_DISK_GB:
        problems.append(f"Only {free_gb} GB of disk space are free in {args.workdir}; free some.")
    if not os.access(workdir, os.W_OK):
        problems.append(f"{args.workdir} is not writable; choose another --workdir.")
    return {
        "ok": not problems,
        "problems": problems,
        "rag_mm": costs.code_version(),
        "python": platform.python_version(),
        "versions": versions,
        **devices,
        "environment": {
            name: os.environ.get(name)
            for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
        },
        "scann": scann,
        "machine": costs.machine()["processor"],
        "system": platform.platform(),
        "cores": costs.machine()["cores"],
        "memory_gb": _memory_gb(),
        "disk_free_gb": free_gb,
        "emoji_font": _emoji_font(),
        "raqm": features.check("raqm"),
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the facts as a table, then the problems."""
    table = rich.table.Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in result.items():
        if key in ("ok", "problems"):
            continue
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for subkey, item in pairs:
            table.add_row(f"{key} {subkey}" if subkey else key, _text(item))
    console.print(table)
    for problem in result["problems"]:
        console.print(f"! {problem}", markup=False)
    if result["ok"]:
        console.print("No problems found.")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _devices() -> dict[str, Any]:
    output, failure = _probe("jax")
    if failure:
        return {"backend": None, "devices": [], "problems": [f"jax does not start ({failure})."]}
    return {**json.loads(output), "problems": []}


def _scann() -> str:
    if _version("scann") is None:
        return "is not installed"
    _, failure = _probe("scann")
    return f"does not load ({failure})" if failure else "loads"


def _import_problems() -> list[str]:
    """A sentence for each reason why modules that the commands import do not import."""
    output, failure = _probe("commands")
    reasons: dict[str, list[str]] = {}
    if failure:
        reasons[failure] = ["rag_mm"]
    else:
        for module, reason in json.loads(output).items():
            reasons.setdefault(reason, []).append(module)
    return [
        f"{modules[0]}{f' and {more} other modules' if (more := len(modules) - 1) else ''} cannot be "
        f"imported ({reason}); run pip install --upgrade --force-reinstall rag_mm."
        for reason, modules in reasons.items()
    ]


def _probe(what: str) -> tuple[str, str]:
    """Runs one of `probes` in a subprocess. Returns (last line printed, why it failed or "")."""
    path = os.pathsep.join([str(pathlib.Path(rag_mm.__file__).parent.parent), *sys.path])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rag_mm.cli.probes", what],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", "no response within two minutes"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reasons = [line for line in lines if re.search(r"rror\b|nknown flag", line)] or lines
        return "", reasons[-1] if reasons else f"exit code {done.returncode}"
    return (done.stdout.strip().splitlines() or [""])[-1], ""


def _version_problems(versions: dict[str, str | None]) -> list[str]:
    problems = []
    jax_version, jaxlib, libtpu = versions["jax"], versions["jaxlib"], versions["libtpu"]
    if jax_version != jaxlib:
        problems.append(
            f"jax {jax_version} and jaxlib {jaxlib} differ; run pip install jax=={jaxlib}."
        )
    required = required_libtpu()
    if libtpu and required and not _matches(libtpu, required):
        problems.append(
            f"jax {jax_version} requires libtpu {required}, not {libtpu}; "
            "run pip install 'rag_mm[tpu]'."
        )
    return problems


def required_libtpu() -> str | None:
    """The libtpu version that the installed jax's `tpu` extra requires, as `0.0.42.*`; None if unknown."""
    for line in importlib.metadata.requires("jax") or []:
        requirement, _, marker = line.partition(";")
        if requirement.strip().startswith("libtpu==") and '"tpu"' in marker:
            return requirement.strip().removeprefix("libtpu==")
    return None


def _matches(version: str, pattern: str) -> bool:
    if pattern.endswith(".*"):
        return f"{version}.".startswith(pattern[:-1])
    return version == pattern


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _memory_gb() -> float | None:
    with contextlib.suppress(ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return None


def _emoji_font() -> str | None:
    for folder in FONTS:
        # As it stands where there is no home.
        for path in sorted(pathlib.Path(os.path.expanduser(folder)).rglob("NotoColorEmoji*.ttf")):
            return str(path)
    return None
