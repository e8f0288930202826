"""Plans of image tokenizers, and their page docs/results/tokenizer_plans.md; `write_page` makes them."""

from collections.abc import Iterator

from rag_mm.perf.plan import plan_rows
from rag_mm.perf.plan.plan_rows import Plan, Plans

PRESETS = ("configs/spae.py:base", "configs/spae.py:large8", "configs/spae.py:vqgan")
TOPOLOGIES = ("v5e:4x4", "v6e:4x4")
COLUMNS = (
    "config",
    "topology",
    "parameters",
    "images in parts",
    "remat",
    "arguments",
    "peak / HBM",
    "fits",
    "GFLOPs per image",
    "step, s (bound by)",
    "compute, memory, links, s",
    "MFU bound",
    "images per s",
    "collectives",
)
HEAD = """# TPU plans of image tokenizers

The training step of the stage `spae`, with all losses that a page switches on, and encoding of a batch,
compiled on a CPU by the TPU compiler (`rag-mm plan`, libtpu {libtpu}, jax {jax}); nothing was run on a TPU.
`python -m rag_mm.perf.plan.write_page tokenizers` writes this page.

Parameters are on every chip, the batch is split over all chips. *Peak* and *HBM* are as in
[plans.md](plans.md), in GiB. FLOPs and bytes through memory are the **compiler's own counts** for the program
of one chip: unlike a decoder's plan they include normalization, activations and copies. The step is the
slowest of these two and of the links at the published peaks. *MFU bound* is the share of the peak FLOPs in
that time; of the FLOPs a quarter, remat's recomputation, does not count with `full`. The search of the
nearest codes is undercounted: a loop's body counts once, and its full-precision products as one pass where
the chip makes several. None of it is a measurement.

## Training step

The page's batch (`--search`): the least remat and the fewest parts that fit.

"""
ENCODING = """
## Encoding

A batch as large as the training step's (`--encode`), in float32 products where the nearest code is sought.

"""


def cases() -> Iterator[tuple[str, list[str]]]:
    """Name and command-line arguments of every plan of an image tokenizer, the cheap ones first."""
    for option in ("--encode", "--search"):
        for topology in TOPOLOGIES:
            for config in PRESETS:
                name = f"{plan_rows.name(config, topology)}{option[1:]}"
                yield name, [f"--config={config}", f"--topology={topology}", option]


def text(plans: Plans) -> str:
    """The page."""
    made = [plan for plan in plans.values() if plan]
    rows = {
        program: [_row(plan) for plan in made if plan["program"] == program]
        for program in ("train", "encode")
    }
    found = HEAD + plan_rows.table(COLUMNS, rows["train"])
    found += "".join(_tried(plan) for plan in made if len(plan.get("tried", ())) > 1)
    return found + ENCODING + plan_rows.table(COLUMNS, rows["encode"]) + plan_rows.missing(plans)


def _row(plan: Plan) -> list[str]:
    is_known = "seconds" in plan
    seconds = plan.get("seconds", {})
    return [
        f"`{plan['config']}`",
        plan["topology"],
        f"{plan['num_params'] / 1e6:.4g} M",
        f"{plan['batch_size']} in {plan['num_parts']}",
        plan["remat"],
        plan_rows.gib(plan["argument_bytes"]),
        plan_rows.memory(plan),
        plan_rows.fits(plan),
        f"{plan['hardware_flops_per_image'] / 1e9:.4g}" if is_known else "-",
        plan_rows.step(plan),
        ", ".join(f"{seconds[key]:.2g}" for key in ("compute", "hbm", "ici")) if is_known else "-",
        f"{100 * plan['mfu_bound']:.0f} %" if is_known else "-",
        f"{plan['images_per_second']:,.0f}" if is_known else "-",
        plan_rows.collectives(plan),
    ]


def _tried(plan: Plan) -> str:
    """What the search compiled, as a line of a list."""
    attempts = []
    for each in plan["tried"]:
        found = f"{100 * each['mfu_bound']:.0f} %" if each["fits"] else "does not fit"
        peak = plan_rows.gib(each["peak_bytes"])
        attempts.append(f"{each['remat']} in {each['num_parts']}: {peak} GiB, {found}")
    return f"\n- `{plan['config']}` on {plan['topology']}: {'; '.join(attempts)}"
