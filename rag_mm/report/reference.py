"""The course of healthy trainings, made from finished runs, so that a report can show a broken one.

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
PICTURE = "curves.png"
_PROGRAM = "python -m rag_mm.report.reference"


@dataclasses.dataclass(frozen=True)
class Reference:
    """From the lowest to the highest value of several runs, by `logs.Line.key`."""

    preset: str
    seeds: tuple[int, ...]
    bands: Mapping[str, Band]

    @property
    def note(self) -> str:
        """What the bands are, for below the charts."""
        seeds = ", ".join(map(str, self.seeds))
        runs = "one run" if len(self.seeds) == 1 else f"{len(self.seeds)} runs"
        return (
            f"The light bands are the range of {runs} of preset {self.preset} that went well "
            f"(seed {seeds}): a healthy training stays in them or near them."
        )


def load(path: str) -> Reference | None:
    """A reference, or None where `path` is empty or nothing is there.

    Raises:
        UserError: what is there is no reference.
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
            f"{path} is no reference of training curves ({type(error).__name__}: {error}); "
            f"make it anew with {_PROGRAM}."
        ) from None


def gather(workdirs: Sequence[epath.PathLike], preset: str) -> Reference:
    """The reference of finished runs that differ in their seed alone.

    Raises:
        UserError: a run is missing, unfinished or edited, or they do not belong together.
    """
    runs = [run_folder.open_run(workdir) for workdir in workdirs]
    configs = [run.config for run in runs]
    seeds = tuple(int(config["seed"]) for config in configs)
    for run, config, seed in zip(runs, configs, seeds, strict=True):
        if seeds.count(seed) > 1:
            raise UserError(f"{run.workdir} is not the only run of seed {seed}; give each once.")
        differing = [
            key
            for key in sorted({*config, *configs[0]} - {"seed", "report"})
            if config.get(key) != configs[0].get(key)
        ]
        if differing:
            raise UserError(
                f"{run.workdir} was made with another config than {runs[0].workdir} "
                f"({', '.join(differing)}); give runs that differ in their seed alone."
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
        raise UserError(f"{runs[0].workdir} has logged no training curve.")
    return Reference(preset, seeds, bands)


def save(reference: Reference, folder: epath.PathLike) -> list[epath.Path]:
    """Writes `curves.json` and the same as a picture, `curves.png`; the paths.

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
    files.write_atomic(folder / PICTURE, curves.curves_png(lines))
    return [folder / FILE_NAME, folder / PICTURE]


def main(words: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = _Parser(
        prog=_PROGRAM,
        description="Makes the bands of a report's training charts from finished runs of one "
        "config and several seeds: their lowest, highest and mean value at each step.",
        epilog=f"example: {_PROGRAM} runs/seed0 runs/seed1 runs/seed2 --out=docs/results/quickstart",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help=f"folder for {FILE_NAME} and {PICTURE}"
    )
    parser.add_argument(
        "--preset",
        default="quick",
        help="what the config is called below the charts (default: %(default)s)",
    )
    args = parser.parse_args(words)
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
    """Over the steps that all runs logged."""
    steps = sorted(set.intersection(*(set(values) for values in runs)))
    values = np.array([[values[step] for step in steps] for values in runs])
    return Band(steps, *(f(values, axis=0).round(6).tolist() for f in (np.min, np.max, np.mean)))


def _band(content: Mapping[str, Any]) -> Band:
    parts = {name: [float(x) for x in content[name]] for name in ("steps", "low", "high", "mean")}
    if len({len(part) for part in parts.values()}) != 1:
        raise ValueError("steps, low, high and mean differ in length")
    if not all(math.isfinite(x) for part in parts.values() for x in part):
        raise ValueError("a value is not finite")
    return Band(**parts)


if __name__ == "__main__":
    sys.exit(main())
