"""Ablations: variants x seeds -> one resumable table with paired standard errors.

A cell is one variant at one seed: metrics with one value per test document. Each cell is written to its own
file as soon as it is measured, so a killed run resumes with the next cell. The metric "a - b" is the
difference of two metrics of the same cell, document by document.

A difference counts as a claim when it has the same sign at all of at least three seeds and exceeds two
standard errors, taken over the seeds' mean differences. A seed that a check stopped, or that diverged, counts
as a failure: no difference of its variant is a claim, however the other seeds came out.
"""

import dataclasses
import difflib
import itertools
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
FAILED = ".failed.json"

Cell = Mapping[str, np.ndarray]
Measure = Callable[[str, int], Mapping[str, npt.ArrayLike]]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Measurements: `cells[variant, seed]` maps a metric to float64 [Q], one value per test document.

    An absent cell was not measured; `failed` gives the reason where measuring it was attempted.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, int], Cell]
    failed: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)

    @property
    def figures(self) -> tuple[str, ...]:
        """Metrics that every measured cell has, sorted."""
        names = [set(cell) for cell in self.cells.values()]
        return tuple(sorted(set.intersection(*names))) if names else ()

    def values(self, variant: str, seed: int, figure: str) -> np.ndarray | None:
        """One value per test document, float64 [Q]; None if the cell was not measured.

        Raises:
            UserError: the cell has no such metric, or the two sides of a difference do not pair.
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
    """Measures the cells that are missing, all variants of one seed before the next seed.

    A cell that fails (UserError, for instance a failed retrieval check) or diverges (FloatingPointError, or a
    non-finite value) is skipped with its reason; the next run of the table tries it again.

    Args:
        measure: (variant, seed) -> metrics, each [Q], one value per test document.
        directory: cells are stored there as `VARIANT/seedN.json`.
        key: (variant, seed) -> digest of everything the cell is measured from.
        overwrite: measure cells again whose recorded key differs.
        after_cell: called with the table after each cell.

    Raises:
        UserError: an invalid variant name or seed, or a cell measured from another config.
        UserError, FloatingPointError: the first error of `measure`, if no cell succeeded.
    """
    check_names(variants, seeds)
    order = [(variant, seed) for seed in seeds for variant in variants]
    stored = {cell: _read(cell_path(directory, *cell), key(*cell), overwrite) for cell in order}
    cells = {cell: values for cell, values in stored.items() if values is not None}
    errors: dict[tuple[str, int], Exception] = {}
    for number, cell in enumerate(order, start=1):
        where = f"cell {number} of {len(order)}, {cell[0]}, seed {cell[1]}"
        if cell in cells:
            progress.say(f"{where}: already done, skipped")
            continue
        progress.say(f"{where}: starting")
        try:
            cells[cell] = _finite(measure(*cell))
        except (UserError, FloatingPointError) as error:
            errors[cell] = error
            progress.say(f"{where}: failed: {error}")
        else:
            _write(cell_path(directory, *cell), key(*cell), cells[cell])
        after_cell(_table(variants, seeds, cells, errors))
    if errors and not cells:
        raise next(iter(errors.values()))
    return _table(variants, seeds, cells, errors)


def write(table: Table, directory: epath.PathLike, figures: Sequence[str]) -> None:
    """Writes the named figures of all cells (all figures if none is named), and failures, for `read`.

    Values have seven digits: the files are kept under version control.
    """
    for cell, values in table.cells.items():
        kept = {
            name: [float(f"{value:.7g}") for value in values[name]]
            for name in figures or values
            if name in values
        }
        path = cell_path(directory, *cell)
        files.write_atomic(path, files.canonical_json({"figures": kept}).encode())
        path.with_suffix(FAILED).unlink(missing_ok=True)
    for cell, reason in table.failed.items():
        files.write_json(cell_path(directory, *cell).with_suffix(FAILED), {"reason": reason})


def read(variants: Sequence[str], seeds: Sequence[int], directory: epath.PathLike) -> Table:
    """The table of the cells and failures that `write` left in a directory.

    Raises:
        UserError: an invalid variant name or seed, a damaged cell, or no cell at all.
    """
    check_names(variants, seeds)
    cells, errors = {}, {}
    for cell in itertools.product(variants, seeds):
        path = cell_path(directory, *cell)
        failure = path.with_suffix(FAILED)
        if path.exists():
            cells[cell] = _finite(_content(path, {"figures"})["figures"])
        elif failure.exists():
            errors[cell] = UserError(files.read_object(failure, reason=str)["reason"])
    if not cells:
        raise UserError(f"{directory} has no finished cell of this ablation.")
    return _table(variants, seeds, cells, errors)


def cell_path(directory: epath.PathLike, variant: str, seed: int) -> epath.Path:
    """The file of one cell."""
    return epath.Path(directory) / variant / f"seed{seed}.json"


def summary(table: Table, figure: str, variant: str) -> dict[str, Any] | None:
    """A metric of one variant over the seeds it was measured at; None if there are none.

    Returns:
        {"mean", "standard_error", "ci95", "n", "over", "seeds", "seed_means"}: the mean over seeds of
        each seed's mean over its `n` test documents. `over` is "seeds", or "documents" when there is only
        one seed: what the standard error is taken over. `ci95` is the half width (Student's t over seeds).
        A difference "a - b" also has "counts": whether it counts as a claim.

    Raises:
        UserError: as `Table.values`; fewer than two documents; or seeds with different numbers of them.
    """
    by_seed = {seed: table.values(variant, seed, figure) for seed in table.seeds}
    measured = {seed: values for seed, values in by_seed.items() if values is not None}
    described = _describe(measured, f"{variant}: {figure}")
    return described if MINUS not in figure else _judged(described, _failures(table, variant))


def compare(table: Table, figure: str, ours: str, theirs: str) -> dict[str, Any] | None:
    """`ours - theirs` of one metric, paired by test document within each seed that both have.

    Returns:
        As `summary`, with "counts"; None if no seed has both.

    Raises:
        UserError: as `summary`, or the two have different numbers of documents.
    """
    what = f"{figure} of {ours} minus {theirs}"
    differences = {}
    for seed in table.seeds:
        left, right = (table.values(variant, seed, figure) for variant in (ours, theirs))
        if left is not None and right is not None:
            differences[seed] = _paired(left, right, f"{what}, seed {seed}")
    return _judged(_describe(differences, what), _failures(table, ours, theirs))


def results(table: Table, figures: Sequence[str], baseline: str | None = None) -> dict[str, Any]:
    """The table as plain JSON, the input of `markdown`.

    Returns:
        {"variants", "seeds", "baseline", "missing": [[variant, seed]], "failed": [[variant, seed, reason]],
        "figures": {metric: {variant: {"value": summary, "minus_baseline": comparison}}}}, with None
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
    """`results` as a Markdown table, followed by a legend and the missing cells.

    A row is a variant, or a metric if there are more metrics than variants.
    """
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
    table = [[name, *cells] for name, cells in zip(header, columns, strict=True)]
    if len(results["figures"]) <= len(variants):
        table = [list(row) for row in zip(*table, strict=True)]
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_legend(results)]) + "\n"


def _legend(results: Mapping[str, Any]) -> list[str]:
    seeds, baseline = results["seeds"], results["baseline"]
    names = ", ".join(map(str, seeds))
    if len(seeds) > 1:
        mean = "Values are means over seeds of each seed's mean over its n test documents"
        lines = [f"{mean}; ± is one standard error, over seeds ({names})."]
    else:
        mean = "Values are means over n test documents"
        lines = [f"{mean} of one seed ({names}); ± is one standard error, over documents."]
    if any(MINUS in figure for figure in results["figures"]):
        lines.append(f"`a{MINUS}b` is a difference within a variant, paired by test document.")
    if baseline is not None:
        lines.append(f"`minus {baseline}` is paired by test document within each seed.")
    lines.append(
        f"✓: the difference counts as a claim: at least {MIN_SEEDS} seeds, none failed, all with the same "
        "sign, and more than two standard errors from zero."
    )
    reasons = {(variant, seed): reason for variant, seed, reason in results["failed"]}
    for variant, seed in results["missing"]:
        reason = reasons.get((variant, seed))
        lines.append(
            f"Failed: {variant}, seed {seed} ({reason})."
            if reason
            else f"Missing: {variant}, seed {seed}."
        )
    # Two spaces end a line in Markdown.
    return [f"{line}  " for line in lines[:-1]] + lines[-1:]


def _text(described: Mapping[str, Any] | None, seeds: Sequence[int]) -> str:
    if described is None:
        return "missing"
    mean, error = described["mean"], described["standard_error"]
    num_seeds = len(described["seeds"])
    # Two significant digits of the standard error; the mean to the same decimal place.
    places = min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    sign = "+" if "counts" in described else ""
    text = f"{mean:{sign}.{places}f} ± {error:.{places}f}"
    if num_seeds < len(seeds):
        over = ", ± over documents" if described["over"] == "documents" else ""
        text += f" ({num_seeds} of {len(seeds)} seeds{over})"
    return f"{text} ✓" if described.get("counts") else text


def _describe(by_seed: Mapping[int, np.ndarray], what: str) -> dict[str, Any] | None:
    if not by_seed:
        return None
    sizes = sorted({values.size for values in by_seed.values()})
    if len(sizes) > 1:
        raise UserError(
            f"{what}: seeds have {sizes[0]} to {sizes[-1]} documents; use the same number for all."
        )
    seed_statistics = [statistics.mean(values, what) for values in by_seed.values()]
    means = [float(seed["mean"]) for seed in seed_statistics]
    mean = float(np.mean(means))
    if len(means) > 1:
        error = statistics.standard_error(means, what)
        # Student's t: over a few seeds the standard error is itself uncertain.
        ci95, over = statistics.student_t95(len(means)) * error, "seeds"
    else:
        (values,) = by_seed.values()
        error = statistics.standard_error(values, what)
        ci95, over = float(seed_statistics[0]["ci95"]), "documents"
    return {
        "mean": mean,
        "standard_error": error,
        "ci95": ci95,
        "n": sizes[0],
        "over": over,
        "seeds": list(by_seed),
        "seed_means": means,
    }


def _failures(table: Table, *variants: str) -> int:
    """The number of seeds at which one of the variants failed."""
    return len({seed for variant, seed in table.failed if variant in variants})


def _judged(described: dict[str, Any] | None, num_failed: int) -> dict[str, Any] | None:
    if described is None:
        return None
    means = np.asarray(described["seed_means"])
    is_far = abs(described["mean"]) > 2 * described["standard_error"]
    is_one_sign = bool((means > 0).all() or (means < 0).all())
    is_whole = not num_failed and len(means) >= MIN_SEEDS
    return described | {"counts": is_whole and is_far and is_one_sign}


def _paired(ours: np.ndarray, theirs: np.ndarray, what: str) -> np.ndarray:
    if ours.size != theirs.size:
        raise UserError(
            f"{what}: {ours.size} documents cannot be paired with {theirs.size}; measure both on the "
            "same documents."
        )
    return ours - theirs


def _named(cell: Cell, name: str, where: str) -> np.ndarray:
    if name not in cell:
        matches = difflib.get_close_matches(name, cell, n=1, cutoff=0.0)
        hint = f"; the closest is {matches[0]}" if matches else ""
        raise UserError(f"{where} has no metric {name!r}{hint}.")
    return cell[name]


def check_names(variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Checks variant names and seeds.

    Raises:
        UserError: a name that cannot be a file name, a negative seed, an empty list, or a duplicate.
    """
    for name in variants:
        if not re.fullmatch(r"\w([\w .+=-]*\w)?", name):
            raise UserError(
                f"{name!r} is not a valid variant name; use letters, digits, spaces and _ . + = -"
            )
    if not variants or not seeds:
        raise UserError("An ablation needs at least one variant and one seed.")
    if min(seeds) < 0:
        raise UserError(f"Seed {min(seeds)} is negative; use 0 or more.")
    if len(set(variants)) < len(variants) or len(set(seeds)) < len(seeds):
        raise UserError("Variants and seeds must be unique; list each one once.")


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
            raise ValueError(f"{name}: expected one value per document, got shape {values.shape}")
        if bad := int((~np.isfinite(values)).sum()):
            raise FloatingPointError(f"{name}: {bad} of {values.size} values are not finite")
    return cell


def _write(path: epath.Path, key: str, cell: Cell) -> None:
    figures = {name: values.tolist() for name, values in cell.items()}
    files.write_atomic(path, files.canonical_json({"key": key, "figures": figures}).encode())


def _read(path: epath.Path, key: str, overwrite: bool) -> Cell | None:
    """The stored cell; None if there is none or it is to be measured again."""
    if not path.exists():
        return None
    content = _content(path, {"key", "figures"})
    if content["key"] == key:
        return _finite(content["figures"])
    if overwrite:
        return None
    raise UserError(
        f"{path} was measured from another config; pass --overwrite to measure it again, or choose "
        "another --workdir."
    )


def _content(path: epath.Path, keys: set[str]) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or set(content) != keys:
        raise UserError(f"{path} is not an ablation cell; move it away.")
    return content
