"""The page docs/results/plans.md: every preset on two topologies, compiled one after the other, resumable.

    make plans

Each plan is kept in `runs/plans/` and not made again; the page is written anew after each one, and says which
are still missing.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from rag_mm.core import files, progress

PRESETS = (
    "configs/ra_cm3.py:tiny",
    "configs/ra_cm3.py:2.7b",
    "configs/cm3leon.py:tiny",
    "configs/cm3leon.py:350m",
    "configs/cm3leon.py:760m",
    "configs/cm3leon.py:7b",
)
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4")
SEARCHED = ("configs/cm3leon.py:350m", "configs/cm3leon.py:7b")
GIB = 1 << 30
COLUMNS = (
    "config",
    "topology",
    "parameters",
    "rows x tokens in parts",
    "remat",
    "arguments",
    "peak / HBM",
    "fits",
    "GFLOPs a token",
    "step, s (bound by)",
    "MFU bound",
    "collectives",
)
SEARCH_COLUMNS = (*COLUMNS[:2], *COLUMNS[3:5], "peak / HBM", "step, s", "MFU bound", "tried")
HEAD = """# Plans for TPUs that are not here

Every preset's training step, compiled on a CPU by the TPU's own compiler (`rag-mm plan`, libtpu {libtpu}, jax
{jax}): nothing here was run on a TPU. `make plans` makes the page; a plan takes minutes on two cores.

*Peak* is what the compiler says the program needs of one chip, *HBM* what it may use, both in GiB. *MFU
bound* is model FLOPs (six a multiplied weight and token, causal attention) over the published peak in the
time that the slowest of arithmetic, memory and links needs at its own published peak: what no run can
exceed, not what one reaches. Full remat alone caps it at 75 %. *Collectives* count instructions in the
program's text.

"""
SEARCH_HEAD = """
## Searched

The largest batch at once and leanest remat that fit (`--search`); a step's batch stays the config's.

"""
TAIL = """
## What the compiler had to be told

- Gradients: asked for a product in the parameter's layout, it all-reduces, or on a small torus goes round the
  ring chip by chip. A reduce-scatter over all chips of a torus, or over an axis other than an array's last,
  becomes an all-reduce as well. So sums go along one side of the torus after the other, over the last axis
  (`core/sharding.py`). A 64 MiB gradient on `v5e:16x16` then costs a chip 64 to 68 MiB sent instead of 127.
- It still all-reduces some gradients where a chip's share of the width is no multiple of 16 (2,560 and 1,536
  over 256), and on `v5p:4x4x4` its program holds all-reduces where the same step has all-gathers on `v5e`.
  All of their bytes are in the links' time, which stays far below arithmetic's.
- `temp_bytes` adds up buffers that never live together; `peak_bytes` is the compiler's own peak.
"""


def main(folder: str = "runs/plans", page: str = "docs/results/plans.md") -> None:
    """Makes what is missing, cheapest first, and the page after each."""
    write_page(epath.Path(folder), epath.Path(page))
    for name, words in cases():
        path = epath.Path(folder) / f"{name}.json"
        if path.exists():
            continue
        progress.say(f"plans: {name}")
        command = [sys.executable, "-m", "rag_mm", "plan", "--json", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        files.write_json(path, json.loads(done.stdout))
        write_page(epath.Path(folder), epath.Path(page))


def cases() -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every plan."""
    for is_searched in (False, True):
        for topology in TOPOLOGIES:
            for config in SEARCHED if is_searched else PRESETS:
                words = [f"--config={config}", f"--topology={topology}"]
                yield _name(config, topology, is_searched), words + ["--search"] * is_searched


def write_page(folder: epath.Path, page: epath.Path) -> None:
    """The page of the plans that are there."""
    made = {name: _read(folder / f"{name}.json") for name, _ in cases()}
    versions = {name: importlib.metadata.version(name) for name in ("libtpu", "jax")}
    rows = [_row(plan) for plan in made.values() if plan and "tried" not in plan]
    searched = [_search_row(plan) for plan in made.values() if plan and "tried" in plan]
    missing = [name for name, plan in made.items() if plan is None]
    text = HEAD.format(**versions) + _head(COLUMNS) + "".join(rows)
    if searched:
        text += SEARCH_HEAD + _head(SEARCH_COLUMNS) + "".join(searched)
    if missing:
        text += f"\nNot made yet: {', '.join(missing)}.\n"
    files.write_atomic(page, (text + TAIL).encode())


def _name(config: str, topology: str, is_searched: bool) -> str:
    page, preset = config.removeprefix("configs/").split(".py:")
    return f"{page}-{preset}-{topology.replace(':', '-')}" + "-search" * is_searched


def _read(path: epath.Path) -> dict[str, Any] | None:
    return files.read_json(path) if path.exists() else None


def _head(columns: tuple[str, ...]) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def _memory(plan: dict[str, Any]) -> str:
    return f"{plan['peak_bytes'] / GIB:.2f} / {plan['hbm_bytes'] / GIB:.2f}"


def _batch(plan: dict[str, Any]) -> str:
    return f"{plan['batch_size']} x {plan['seq_len']} in {plan['num_parts']}"


def _row(plan: dict[str, Any]) -> str:
    arguments, seconds = plan["argument_bytes"], plan["seconds"]
    cells = [
        f"`{plan['config']}`",
        plan["topology"],
        f"{plan['num_params'] / 1e9:.4g} B",
        _batch(plan),
        plan["remat"],
        "-" if arguments is None else f"{arguments / GIB:.2f}",
        _memory(plan),
        "yes" if plan["fits"] else f"no, by {plan['over_bytes'] / GIB:.2f}",
        f"{plan['flops_per_token'] / 1e9:.4g}",
        f"{plan['step_seconds']:.3g} ({max(seconds, key=seconds.get)})",
        f"{100 * plan['mfu_bound']:.0f} %",
        " ".join(f"{kind} {count}" for kind, count in plan["collectives"].items() if count),
    ]
    return f"| {' | '.join(cells)} |\n"


def _search_row(plan: dict[str, Any]) -> str:
    tried = []
    for each in plan["tried"]:
        verdict = f"{100 * each['mfu_bound']:.0f} %" if each["fits"] else "does not fit"
        tried.append(
            f"{each['remat']} in {each['num_parts']}: {each['peak_bytes'] / GIB:.1f} GiB, {verdict}"
        )
    cells = [
        f"`{plan['config']}`",
        plan["topology"],
        _batch(plan),
        plan["remat"],
        _memory(plan),
        f"{plan['step_seconds']:.3g}",
        f"{100 * plan['mfu_bound']:.0f} %",
        "; ".join(tried),
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
