"""Reference bands for the training charts of a report, computed from healthy finished runs.

python -m rag_mm.report.reference runs/seed0 runs/seed1 runs/seed2 --out=docs/results/quickstart
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.report import curves, logs
from rag_mm.report.content import Band, Curve

FILE_NAME = "curves.json"
PLOT_NAME = "curves.png"
_PROGRAM = "python -m rag_mm.report.reference"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Range of values over several runs, by `logs.Line.key`."""

    preset: str
    seeds: tuple[int, ...]
    bands: Mapping[str, Band]

    @property
    def note(self) -> str:
        """A sentence that explains the bands, shown above the charts."""
        seeds = ", ".join(map(str, self.seeds))
        runs = "one run" if len(self.seeds) == 1 else f"{len(self.seeds)} runs"
        return (
            f"The light bands show the range of {runs} of preset {self.preset} that trained normally "
            f"(seed {seeds}); a healthy run stays in or near them."
        )


def load(path: str) -> Reference | None:
    """Loads a reference; None if `path` is empty or does not exist.

    Raises:
        UserError: the file is not a valid reference.
    """
    if not path or not epath.Path(path).exists():
        return None
    content = files.read_json(path)
    try:
        seeds = tuple(int(seed) for seed in content["seeds"])
        bands = {key: _band(value) for key, value in content["curves"].items()}
        return Reference(str(content["preset"]), seeds, bands)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a valid reference for training curves ({type(error).__name__}: {error}); "
            f"recreate it with {_PROGRAM}."
        ) from None


def gather(workdirs: Sequence[epath.PathLike], preset: str) -> Reference:
    """Builds the reference of finished runs that differ only in their seed.

    Raises:
        UserError: a run is missing, unfinished or edited, or the runs' configs differ.
    """
    runs = [run_folder.open_run(workdir) for workdir in workdirs]
    configs = [run.config for run in runs]
    seeds = tuple(int(config["seed"]) for config in configs)
    for run, config, seed in zip(runs, configs, seeds, strict=True):
        if seeds.count(seed) > 1:
            raise UserError(f"{run.workdir}: two runs have seed {seed}; give one run per seed.")
        differing = [
            key
            for key in sorted({*config, *configs[0]} - {"seed", "report"})
            if config.get(key) != configs[0].get(key)
        ]
        if differing:
            raise UserError(
                f"{run.workdir} has another config than {runs[0].workdir} "
                f"({', '.join(differing)}); give runs that differ only in their seed."
            )
    for stage in {line.stage for line in logs.LINES} & set(configs[0]["stages"]):
        for run in runs:
            run.finished_stage(stage)
    bands = {}
    for line in logs.LINES:
        band = _envelope([logs.read_values(run.workdir, line) for run in runs])
        if band.steps:
            bands[line.key] = band
    if not bands:
        raise UserError(f"{runs[0].workdir} has no logged training curves.")
    return Reference(preset, seeds, bands)


def save(reference: Reference, folder: epath.PathLike) -> list[epath.Path]:
    """Writes `curves.json` and a plot of it, `curves.png`. Returns both paths.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = epath.Path(folder)
    bands = {key: dataclasses.asdict(band) for key, band in reference.bands.items()}
    content = {"preset": reference.preset, "seeds": list(reference.seeds), "curves": bands}
    files.write_json(folder / FILE_NAME, content)
    lines = [
        Curve(line.chart, line.label, band.steps, band.mean, band)
        for line in logs.LINES
        if (band := reference.bands.get(line.key)) is not None
    ]
    files.write_atomic(folder / PLOT_NAME, curves.curves_png(lines))
    return [folder / FILE_NAME, folder / PLOT_NAME]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _Parser(
        prog=_PROGRAM,
        description="Computes the bands of a report's training charts from finished runs of one config "
        "with several seeds: the minimum, maximum and mean at each step.",
        epilog=f"example: {_PROGRAM} runs/seed0 runs/seed1 runs/seed2 --out=docs/results/quickstart",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help=f"folder for {FILE_NAME} and {PLOT_NAME}"
    )
    parser.add_argument(
        "--preset",
        default="quick",
        help="name of the config in the report (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        written = save(gather(args.runs, args.preset), args.out)
    except UserError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help.\n")


def _envelope(runs: Sequence[Mapping[int, float]]) -> Band:
    """Minimum, maximum and mean at the steps that all runs logged."""
    steps = sorted(set.intersection(*(set(values) for values in runs)))
    values = np.array([[values[step] for step in steps] for values in runs])
    return Band(steps, *(f(values, axis=0).round(6).tolist() for f in (np.min, np.max, np.mean)))


def _band(content: Mapping[str, Any]) -> Band:
    parts = {name: [float(x) for x in content[name]] for name in ("steps", "low", "high", "mean")}
    if len({len(part) for part in parts.values()}) != 1:
        raise ValueError("steps, low, high and mean have different lengths")
    if not all(math.isfinite(x) for part in parts.values() for x in part):
        raise ValueError("a value is not finite")
    return Band(**parts)


if __name__ == "__main__":
    sys.exit(main())
