"""What the pages of plans have in common: names of plans, tables, and the cells of a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1 << 30
Plan = dict[str, Any]  # The keys of `rag-mm plan --json`.
Plans = Mapping[str, Plan | None]


def name(config: str, topology: str) -> str:
    """The name of the plan of a page's preset, such as spae-base-v5e-4x4."""
    page, preset = config.removeprefix("configs/").split(".py:")
    return f"{page}-{preset}-{topology.replace(':', '-')}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (columns, *rows)]
    return lines[0] + f"{'|---' * len(columns)}|\n" + "".join(lines[1:])


def missing(plans: Plans) -> str:
    """A paragraph that names the plans that are not made yet; empty if all are."""
    names = [name for name, plan in plans.items() if plan is None]
    return f"\nMissing: {', '.join(names)}.\n" if names else ""


def gib(size: int | None) -> str:
    """Bytes in GiB, or a dash."""
    return "-" if size is None else f"{size / GIB:.2f}"


def memory(plan: Plan) -> str:
    """Peak and HBM of a chip in GiB."""
    return f"{gib(plan['peak_bytes'])} / {gib(plan['hbm_bytes'])}"


def fits(plan: Plan) -> str:
    """Whether it fits, or by how much it does not."""
    return "yes" if plan["fits"] else f"no, by {gib(plan['over_bytes'])}"


def step(plan: Plan) -> str:
    """Seconds of a step, and by what it is bound; a dash where they are unknown."""
    if "seconds" not in plan:
        return "-"
    return f"{plan['step_seconds']:.3g} ({max(plan['seconds'], key=plan['seconds'].get)})"


def collectives(plan: Plan) -> str:
    """Numbers of collectives, by kind."""
    return " ".join(f"{kind} {count}" for kind, count in plan["collectives"].items() if count)
