"""Writes docs/results/plans.md: every preset on two topologies, compiled one by one, resumable.

    make plans

Each plan is stored in `runs/plans/` and not recomputed; the page is rewritten after each one and lists the
missing ones.
"""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

from etils import epath

from rag_mm.core import files, progress
from rag_mm.perf.plan import plan_rows, tokenizer_rows
from rag_mm.perf.plan.plan_rows import GIB, Plan, Plans

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
COLUMNS = (
    "config",
    "topology",
    "parameters",
    "sequences x tokens in parts",
    "remat",
    "arguments",
    "peak / HBM",
    "fits",
    "GFLOPs per token",
    "step, s (bound by)",
    "MFU bound",
    "collectives",
)
SEARCH_COLUMNS = (*COLUMNS[:2], *COLUMNS[3:5], "peak / HBM", "step, s", "MFU bound", "tried")
HEAD = """# TPU plans, compiled ahead of time

Every preset's training step, compiled on a CPU by the TPU compiler (`rag-mm plan`, libtpu {libtpu}, jax
{jax}); nothing was run on a TPU. `make plans` writes this page; a plan takes minutes on two cores.

*Peak* is the memory that the program needs on one chip according to the compiler, *HBM* what it may use,
both in GiB. *MFU bound* is a roofline: model FLOPs (six per multiplied weight and token, causal attention)
over the published peak FLOPs in the time of the slowest of compute, memory and interconnect at their
published peaks. It is an upper bound, not a prediction; full remat alone limits it to 75 %. *Collectives*
counts instructions in the program's text.

"""
SEARCH_HEAD = """
## Searched

The largest microbatch and least remat that fit (`--search`); the step's batch stays that of the config.

"""
TAIL = """
## Notes on the compiler

- Gradients: when a product is requested in the parameter's layout, the compiler uses an all-reduce, or on a
  small torus a ring of permutes. A reduce-scatter over all chips of a torus, or over any axis but an
  array's last, also becomes an all-reduce. Sums are therefore taken along one torus dimension after the
  other, over the last axis (`core/sharding.py`). A chip then sends 64 to 68 MiB for a 64 MiB gradient on
  `v5e:16x16`, not 127.
- Some gradients are still all-reduced: where a chip's share of the width is not a multiple of 16 (2,560 and
  1,536 over 256), and on `v5p:4x4x4` where the same step uses all-gathers on `v5e`. Their bytes are
  included in the interconnect time, which is far below the compute time.
- `temp_bytes` adds up buffers that are never live at the same time; `peak_bytes` is the compiler's peak.
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of plans.

    Attributes:
        path: where it is.
        cases: names and command-line arguments of its plans.
        text: the page, from the plans by name, None for those that are missing.
    """

    path: str
    cases: Callable[[], Iterator[tuple[str, list[str]]]]
    text: Callable[[Plans], str]


def main(*names: str, folder: str = "runs/plans") -> None:
    """Computes the missing plans of some pages, of all without names, and rewrites a page after each plan."""
    for page in [PAGES[name] for name in names or PAGES]:
        write_page(epath.Path(folder), page)
        for name, arguments in page.cases():
            path = epath.Path(folder) / f"{name}.json"
            if path.exists():
                continue
            progress.say(f"plans: {name}")
            command = [sys.executable, "-m", "rag_mm", "plan", "--json", *arguments]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            files.write_json(path, json.loads(process.stdout))
            write_page(epath.Path(folder), page)


def write_page(folder: epath.Path, page: Page) -> None:
    """Writes the page of the plans computed so far."""
    plans = {name: _read(folder / f"{name}.json") for name, _ in page.cases()}
    text = page.text(plans)
    for name in ("libtpu", "jax"):
        text = text.replace(f"{{{name}}}", importlib.metadata.version(name))
    files.write_atomic(epath.Path(page.path), text.encode())


def cases() -> Iterator[tuple[str, list[str]]]:
    """Name and command-line arguments of every plan of a decoder."""
    for is_searched in (False, True):
        for topology in TOPOLOGIES:
            for config in SEARCHED if is_searched else PRESETS:
                arguments = [f"--config={config}", f"--topology={topology}"]
                arguments += ["--search"] * is_searched
                yield _name(config, topology, is_searched), arguments


def text(plans: Plans) -> str:
    """The decoders' page."""
    rows = [_row(plan) for plan in plans.values() if plan and "tried" not in plan]
    searched = [_search_row(plan) for plan in plans.values() if plan and "tried" in plan]
    found = HEAD + plan_rows.table(COLUMNS, rows)
    if searched:
        found += SEARCH_HEAD + plan_rows.table(SEARCH_COLUMNS, searched)
    return found + plan_rows.missing(plans) + TAIL


def _name(config: str, topology: str, is_searched: bool) -> str:
    return plan_rows.name(config, topology) + "-search" * is_searched


def _read(path: epath.Path) -> Plan | None:
    return files.read_json(path) if path.exists() else None


def _batch(plan: Plan) -> str:
    return f"{plan['batch_size']} x {plan['seq_len']} in {plan['num_parts']}"


def _row(plan: Plan) -> list[str]:
    return [
        f"`{plan['config']}`",
        plan["topology"],
        f"{plan['num_params'] / 1e9:.4g} B",
        _batch(plan),
        plan["remat"],
        plan_rows.gib(plan["argument_bytes"]),
        plan_rows.memory(plan),
        plan_rows.fits(plan),
        f"{plan['flops_per_token'] / 1e9:.4g}",
        plan_rows.step(plan),
        f"{100 * plan['mfu_bound']:.0f} %",
        plan_rows.collectives(plan),
    ]


def _search_row(plan: Plan) -> list[str]:
    tried = []
    for attempt in plan["tried"]:
        result = f"{100 * attempt['mfu_bound']:.0f} %" if attempt["fits"] else "does not fit"
        gib = attempt["peak_bytes"] / GIB
        tried.append(f"{attempt['remat']} in {attempt['num_parts']}: {gib:.1f} GiB, {result}")
    return [
        f"`{plan['config']}`",
        plan["topology"],
        _batch(plan),
        plan["remat"],
        plan_rows.memory(plan),
        f"{plan['step_seconds']:.3g}",
        f"{100 * plan['mfu_bound']:.0f} %",
        "; ".join(tried),
    ]


PAGES = {
    "decoders": Page("docs/results/plans.md", cases, text),
    "tokenizers": Page(
        "docs/results/tokenizer_plans.md", tokenizer_rows.cases, tokenizer_rows.text
    ),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
