"""Runs an ablation: one run per variant and seed; runs reuse the stages that they have in common."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import compilation_cache, configuration, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.eval import ablation_table
from rag_mm.stages import chain, chain_config
from rag_mm.stages.ablation_plan import KEY, AblationPlan
from rag_mm.stages.stage import PER_DOCUMENT

KEPT = "cells"  # Folder with what a table needs of each cell, small enough for version control.
METRICS_SUFFIX = ".metrics.json"


def run_ablation(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    seeds: Sequence[int] | None = None,
    reuse_from: Sequence[epath.PathLike] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs the cells that have no figures yet, and writes `table.json` and `table.md` after each.

    A cell is the run `workdir/VARIANT/seedN`; `workdir/cells` holds what the table needs of each cell, and
    the metrics of its run, for `make_table`. A stage that another cell, or a run in `reuse_from`, has
    finished with the same config and inputs is copied instead of computed.

    Args:
        config: nested plain dicts with the key `ablation`, see `AblationPlan`.
        workdir: folder of the table and the runs; created if it does not exist.
        seeds: replace those of the config.
        reuse_from: runs whose finished stages may be copied.
        overwrite: rebuild cells and stages whose config has changed.

    Returns:
        The result of `eval.ablation_table.results`, as in `table.json`.

    Raises:
        UserError: the config or the folder is unsuitable (nothing has been changed then),
            or a cell raises one.
    """
    plan = _plan(config, seeds)
    folder = epath.Path(workdir)
    if (folder / "config.json").exists():
        raise UserError(f"{workdir} is a run; give the ablation another folder.")
    reused_runs = [run_folder.open_run(source).workdir for source in reuse_from]
    cells = _cells(config, plan, folder)
    if not overwrite:
        _check_runs(cells)

    def measure(*cell: Any) -> dict[str, np.ndarray]:
        others = [other.workdir for name, other in cells.items() if name != cell]
        run = chain.run_chain(
            cells[cell].config,
            cells[cell].workdir,
            overwrite=overwrite,
            reuse_from=[*others, *reused_runs],
        )
        kept = ablation_table.cell_path(folder / KEPT, *cell).with_suffix(METRICS_SUFFIX)
        files.write_json(kept, run.metrics)
        return _flatten(files.read_json(run.finished_stage(plan.stage) / PER_DOCUMENT))

    def save(table: ablation_table.Table) -> dict[str, Any]:
        ablation_table.write(table, folder / KEPT, plan.needed)
        return _save(plan, table, folder)

    compilation_cache.keep_programs()
    table = ablation_table.run(
        plan.order,
        plan.seeds,
        measure,
        folder,
        lambda *cell: cells[cell].key,
        overwrite=overwrite,
        after_cell=save,
    )
    return save(table)


def make_table(
    config: Mapping[str, Any], workdir: epath.PathLike, *, seeds: Sequence[int] | None = None
) -> dict[str, Any]:
    """Writes `table.json` and `table.md` from the cells in a folder, such as a copy of `cells`; runs nothing.

    The cells may have been measured from an earlier config.

    Returns:
        The result of `eval.ablation_table.results`.

    Raises:
        UserError: there is no cell, or one lacks a figure of the table.
    """
    plan = _plan(config, seeds)
    table = ablation_table.read(plan.order, plan.seeds, workdir)
    return _save(plan, table, epath.Path(workdir))


def _save(plan: AblationPlan, table: ablation_table.Table, folder: epath.Path) -> dict[str, Any]:
    results = ablation_table.results(table, plan.columns or table.figures, plan.baseline)
    files.write_json(folder / "table.json", results)
    files.write_atomic(folder / "table.md", ablation_table.markdown(results).encode())
    return results


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A cell's file of figures, run folder and config, and the digest of all configs it depends on."""

    path: epath.Path
    workdir: epath.Path
    config: dict[str, Any]
    key: str


def _plan(config: Mapping[str, Any], seeds: Sequence[int] | None) -> AblationPlan:
    if KEY not in config:
        raise UserError(f"The config has no {KEY!r} section with variants, seeds and figures.")
    changes = {} if seeds is None else {"seeds": list(seeds)}
    plan = configuration.make(AblationPlan, {**config[KEY], **changes}, KEY)
    ablation_table.check_names(plan.order, plan.seeds)
    if plan.stage not in config.get("stages", ()):
        raise UserError(f"{KEY}.stage is {plan.stage!r}, which is not among the config's stages.")
    return plan


def _cells(
    config: Mapping[str, Any], plan: AblationPlan, folder: epath.Path
) -> dict[tuple[str, int], _Cell]:
    cells = {}
    for variant, overrides in plan.variants.items():
        for seed in plan.seeds:
            cell_config = _override(config, variant, {**overrides, "seed": seed})
            path = ablation_table.cell_path(folder, variant, seed)
            key = _key(plan.stage, cell_config)
            cells[variant, seed] = _Cell(path, path.with_suffix(""), cell_config, key)
    return cells


def _override(
    config: Mapping[str, Any], variant: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of one cell, without the ablation section."""
    variant_config = {key: value for key, value in config.items() if key != KEY}
    try:
        plain = chain_config.override(variant_config, overrides)
        chain_config.stage_configs(plain)
    except UserError as error:
        raise UserError(f"Variant {variant!r}: {error}") from error
    return plain


def _check_runs(cells: Mapping[tuple[str, int], _Cell]) -> None:
    """Rejects early what a cell would reject hours later: stages left by another config, or edited."""
    for (variant, seed), cell in cells.items():
        if cell.path.exists():
            continue
        run = run_folder.Run(cell.workdir)
        for name, stage_config in chain_config.stage_configs(cell.config).items():
            try:
                inputs = chain_config.STAGES[name].inputs_for(stage_config)
                run_folder.check_stage(run, name, chain_config.slice_of(stage_config), inputs)
            except UserError as error:
                raise UserError(f"{variant}, seed {seed}: {error}") from error


def _key(stage: str, config: Mapping[str, Any]) -> str:
    """Digest of the configs of a stage and of all stages that it depends on."""
    configs = chain_config.stage_configs(config)
    needed, todo = {}, [stage]
    while todo:
        name = todo.pop()
        reader = chain_config.STAGES[name]
        todo += reader.inputs_for(configs[name]) if name in configs else reader.inputs
        if name in configs:
            needed[name] = chain_config.slice_of(configs[name])
    return files.digest(files.canonical_json({"stage": stage, "configs": needed}).encode())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """{"held_out": {"docs2": {"joint": [...]}}} -> {"held_out.docs2.joint": float64 [Q]}."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = np.asarray(value, np.float64)
    return flat
