"""Ablations: variants x seeds -> one table that can be resumed, with paired standard errors.

A cell is one variant at one seed: figures with a value for each test document. Each lies in a file of its
own as soon as it is measured, so a killed table goes on with the next cell. A figure may be written
"a - b": the difference of two figures of the same cell, document by document.

A claim counts when the difference has one sign at all of at least three seeds and is more than two
standard errors from zero, the standard error being that over seeds of each seed's mean difference.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from rag_mm.core import files, progress
from rag_mm.core.errors import UserError
from rag_mm.eval import statistics

MINUS = " - "
MIN_SEEDS = 3
# 97.5 % points of Student's t at 1, 2, ... degrees of freedom: the mean over few seeds is uncertain, and so
# is its standard error. Beyond, the last one stands, a little too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Cell = Mapping[str, np.ndarray]
Measure = Callable[[str, int], Mapping[str, npt.ArrayLike]]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What was measured: `cells[variant, seed]` maps a figure's name to float64 [Q].

    A cell that is not there was not measured; `failed` says why where it was tried.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, int], Cell]
    failed: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)

    @property
    def figures(self) -> tuple[str, ...]:
        """Names that every measured cell has, sorted."""
        names = [set(cell) for cell in self.cells.values()]
        return tuple(sorted(set.intersection(*names))) if names else ()

    def values(self, variant: str, seed: int, figure: str) -> np.ndarray | None:
        """One value a test document, float64 [Q]; None where the cell was not measured.

        Raises:
            UserError: the cell has no such figure, or the two of a difference do not pair.
            ValueError: the table has no such variant or seed.
        """
        if variant not in self.variants or seed not in self.seeds:
            raise ValueError(f"the table has no cell {variant!r}, {seed}")
        if (variant, seed) not in self.cells:
            return None
        cell, where = self.cells[variant, seed], f"{variant}, seed {seed}"
        ours, minus, theirs = figure.partition(MINUS)
        if not minus:
            return _named(cell, ours, where)
        return _paired(_named(cell, ours, where), _named(cell, theirs, where), f"{where}: {figure}")


def run(
    variants: Sequence[str],
    seeds: Sequence[int],
    measure: Measure,
    directory: epath.PathLike,
    key: Callable[[str, int], str],
    *,
    overwrite: bool = False,
    after_cell: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Measures the cells that are not there yet, all variants of a seed before the next seed.

    A cell that gives up (UserError: a gate, say) or diverges (FloatingPointError, or a figure that is
    not finite) is left out with the reason, and the others go on; the next run of the table tries it again.

    Args:
        measure: (variant, seed) -> figures, one value a test document [Q] each.
        directory: cells lie in `VARIANT/seedN.json` there.
        key: (variant, seed) -> what the cell is measured from, as a digest.
        overwrite: measure those cells again whose recorded key is another.
        after_cell: is shown the table as it grows.

    Raises:
        UserError: a name or seed that no file can have, or a cell measured from something else.
        UserError, FloatingPointError: what `measure` raised, where it never succeeded.
    """
    check_names(variants, seeds)
    order = [(variant, seed) for seed in seeds for variant in variants]
    read = {cell: _read(cell_path(directory, *cell), key(*cell), overwrite) for cell in order}
    cells = {cell: found for cell, found in read.items() if found is not None}
    errors: dict[tuple[str, int], Exception] = {}
    for place, cell in enumerate(order, start=1):
        where = f"cell {place} of {len(order)}, {cell[0]}, seed {cell[1]}"
        if cell in cells:
            progress.say(f"{where}: done before")
            continue
        progress.say(f"{where}: begins")
        try:
            cells[cell] = _finite(measure(*cell))
        except (UserError, FloatingPointError) as error:
            errors[cell] = error
            progress.say(f"{where}: left out: {error}")
        else:
            _write(cell_path(directory, *cell), key(*cell), cells[cell])
        after_cell(_table(variants, seeds, cells, errors))
    if errors and not cells:
        raise next(iter(errors.values()))
    return _table(variants, seeds, cells, errors)


def cell_path(directory: epath.PathLike, variant: str, seed: int) -> epath.Path:
    """The file of one cell."""
    return epath.Path(directory) / variant / f"seed{seed}.json"


def summary(table: Table, figure: str, variant: str) -> dict[str, Any] | None:
    """A figure of one variant over the seeds at which it was measured; None if at none.

    Returns:
        {"mean", "standard_error", "ci95", "n", "over", "seeds", "seed_means"}: the mean over seeds of
        each seed's mean over its `n` test documents; `over` says whether the standard error is over
        "seeds" or, of one seed, over its "documents"; `ci95` is the half width. A difference "a - b"
        also has "counts": whether it counts as a claim.

    Raises:
        UserError: as `Table.values`; fewer than two documents; or seeds with unequal numbers of them.
    """
    by_seed = {seed: table.values(variant, seed, figure) for seed in table.seeds}
    found = {seed: values for seed, values in by_seed.items() if values is not None}
    described = _describe(found, f"{variant}: {figure}")
    return described if described is None or MINUS not in figure else _judged(described)


def compare(table: Table, figure: str, ours: str, theirs: str) -> dict[str, Any] | None:
    """`ours - theirs` of one figure, paired by test document within each seed that both have.

    Returns:
        As `summary`, with "counts"; None if no seed has both.

    Raises:
        UserError: as `summary`, or the documents of the two do not pair.
    """
    what = f"{figure} of {ours} minus {theirs}"
    found = {}
    for seed in table.seeds:
        left, right = (table.values(variant, seed, figure) for variant in (ours, theirs))
        if left is not None and right is not None:
            found[seed] = _paired(left, right, f"{what}, seed {seed}")
    described = _describe(found, what)
    return described and _judged(described)


def results(table: Table, figures: Sequence[str], baseline: str | None = None) -> dict[str, Any]:
    """The table as plain JSON, from which `markdown` renders it.

    Returns:
        {"variants", "seeds", "baseline", "missing": [[variant, seed]], "failed": [[variant, seed, why]],
        "figures": {figure: {variant: {"value": summary, "minus_baseline": comparison}}}}, None standing
        for what was not measured.

    Raises:
        UserError: as `summary` and `compare`.
    """

    def entry(figure: str, variant: str) -> dict[str, Any]:
        difference = None
        if baseline is not None and variant != baseline:
            difference = compare(table, figure, variant, baseline)
        return {"value": summary(table, figure, variant), "minus_baseline": difference}

    order = [(variant, seed) for variant in table.variants for seed in table.seeds]
    return {
        "variants": list(table.variants),
        "seeds": list(table.seeds),
        "baseline": baseline,
        "missing": [[*cell] for cell in order if cell not in table.cells],
        "failed": [[*cell, table.failed[cell]] for cell in order if cell in table.failed],
        "figures": {
            figure: {variant: entry(figure, variant) for variant in table.variants}
            for figure in figures
        },
    }


def markdown(results: Mapping[str, Any]) -> str:
    """`results` as a table in Markdown, and beneath it what its signs mean and what is missing."""
    baseline, variants, seeds = results["baseline"], results["variants"], results["seeds"]
    header, columns = ["variant"], [list(variants)]
    for figure, entries in results["figures"].items():
        counts = {entry["value"]["n"] for entry in entries.values() if entry["value"]}
        sizes = f" (n = {', '.join(map(str, sorted(counts)))})" if counts else ""
        header.append(f"{figure}{sizes}")
        columns.append([_text(entries[name]["value"], seeds) for name in variants])
        if baseline is not None:
            header.append(f"minus {baseline}")
            differences = [_text(entries[name]["minus_baseline"], seeds) for name in variants]
            differences[variants.index(baseline)] = ""
            columns.append(differences)
    rows = [header, ["---"] * len(header), *(list(row) for row in zip(*columns, strict=True))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_legend(results)]) + "\n"


def _legend(results: Mapping[str, Any]) -> list[str]:
    seeds, baseline = results["seeds"], results["baseline"]
    names = ", ".join(map(str, seeds))
    if len(seeds) > 1:
        mean = "A figure is the mean over seeds of each seed's mean over its n test documents"
        lines = [f"{mean}; ± is one standard error, over seeds ({names})."]
    else:
        mean = "A figure is the mean over n test documents"
        lines = [f"{mean} of one seed ({names}); ± is one standard error, over documents."]
    if any(MINUS in figure for figure in results["figures"]):
        lines.append(f"`a{MINUS}b` is a difference within a variant, paired by test document.")
    if baseline is not None:
        lines.append(f"`minus {baseline}` is paired by test document within each seed.")
    lines.append(
        f"✓: the difference counts as a claim: at least {MIN_SEEDS} seeds, all of one sign, and more "
        "than two standard errors."
    )
    reasons = {(variant, seed): why for variant, seed, why in results["failed"]}
    for variant, seed in results["missing"]:
        why = reasons.get((variant, seed))
        lines.append(f"Missing: {variant}, seed {seed}{f' ({why})' if why else ''}.")
    # Two spaces end a line in Markdown.
    return [f"{line}  " for line in lines[:-1]] + lines[-1:]


def _text(described: Mapping[str, Any] | None, seeds: Sequence[int]) -> str:
    if described is None:
        return "missing"
    mean, error, found = described["mean"], described["standard_error"], len(described["seeds"])
    # Two digits of the standard error; the mean to the same place.
    places = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    sign = "+" if "counts" in described else ""
    text = f"{mean:{sign}.{places}f} ± {error:.{places}f}"
    if found < len(seeds):
        over = ", ± over documents" if described["over"] == "documents" else ""
        text += f" ({found} of {len(seeds)} seeds{over})"
    return f"{text} ✓" if described.get("counts") else text


def _describe(by_seed: Mapping[int, np.ndarray], what: str) -> dict[str, Any] | None:
    if not by_seed:
        return None
    sizes = sorted({values.size for values in by_seed.values()})
    if len(sizes) > 1:
        raise UserError(
            f"{what}: seeds have {sizes[0]} to {sizes[-1]} documents; give all as many."
        )
    of_seeds = [statistics.mean(values, what) for values in by_seed.values()]
    means = [float(each["mean"]) for each in of_seeds]
    mean = float(np.mean(means))
    if len(means) > 1:
        error = statistics.standard_error(means, what)
        ci95, over = _T95[min(len(means) - 1, len(_T95)) - 1] * error, "seeds"
    else:
        (values,) = by_seed.values()
        error = statistics.standard_error(values, what)
        ci95, over = float(of_seeds[0]["ci95"]), "documents"
    return {
        "mean": mean,
        "standard_error": error,
        "ci95": ci95,
        "n": sizes[0],
        "over": over,
        "seeds": list(by_seed),
        "seed_means": means,
    }


def _judged(described: dict[str, Any]) -> dict[str, Any]:
    means = np.asarray(described["seed_means"])
    is_far = abs(described["mean"]) > 2 * described["standard_error"]
    is_one_sign = bool((means > 0).all() or (means < 0).all())
    return described | {"counts": len(means) >= MIN_SEEDS and is_far and is_one_sign}


def _paired(ours: np.ndarray, theirs: np.ndarray, what: str) -> np.ndarray:
    if ours.size != theirs.size:
        raise UserError(
            f"{what}: {ours.size} documents cannot be paired with {theirs.size}; measure both on the "
            "same ones."
        )
    return ours - theirs


def _named(cell: Cell, name: str, where: str) -> np.ndarray:
    if name not in cell:
        near = difflib.get_close_matches(name, cell, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"{where} has no figure {name!r}{hint}.")
    return cell[name]


def check_names(variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuses names of variants and seeds that no file can have, none at all, and doubles.

    Raises:
        UserError: see above.
    """
    for name in variants:
        if not re.fullmatch(r"\w([\w .+=-]*\w)?", name):
            raise UserError(
                f"{name!r} cannot name a variant; use letters, digits, blanks and _ . + = -"
            )
    if not variants or not seeds:
        raise UserError("An ablation needs at least one variant and one seed.")
    if min(seeds) < 0:
        raise UserError(f"There is no seed {min(seeds)}; give 0 or more.")
    if len(set(variants)) < len(variants) or len(set(seeds)) < len(seeds):
        raise UserError("An ablation names each variant and each seed once.")


def _table(
    variants: Sequence[str],
    seeds: Sequence[int],
    cells: Mapping[tuple[str, int], Cell],
    errors: Mapping[tuple[str, int], Exception],
) -> Table:
    reasons = {cell: str(error).rstrip(".") for cell, error in errors.items()}
    return Table(tuple(variants), tuple(seeds), dict(cells), reasons)


def _finite(figures: Mapping[str, npt.ArrayLike]) -> Cell:
    cell = {name: np.asarray(values, np.float64) for name, values in figures.items()}
    for name, values in cell.items():
        if values.ndim != 1:
            raise ValueError(f"{name}: one value a document is wanted, not shape {values.shape}")
        if bad := int((~np.isfinite(values)).sum()):
            raise FloatingPointError(f"{name}: {bad} of {values.size} values are not finite")
    return cell


def _write(path: epath.Path, key: str, cell: Cell) -> None:
    figures = {name: values.tolist() for name, values in cell.items()}
    files.write_atomic(path, files.canonical_json({"key": key, "figures": figures}).encode())


def _read(path: epath.Path, key: str, overwrite: bool) -> Cell | None:
    """None where there is no cell, or one to be measured again."""
    if not path.exists():
        return None
    found = files.read_json(path)
    if not isinstance(found, dict) or set(found) != {"key", "figures"}:
        raise UserError(f"{path} is not a cell of an ablation; move it away.")
    if found["key"] == key:
        return {name: np.asarray(values, np.float64) for name, values in found["figures"].items()}
    if overwrite:
        return None
    raise UserError(
        f"{path} was measured from another config; measure it again with --overwrite or choose another "
        "--workdir."
    )
