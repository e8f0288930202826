"""Ingestion larger than one machine: an Apache Beam pipeline that checks records and writes them as our own.

A source is cut into ranges of its positions. Each is read, checked and written by itself, as one ArrayRecord
file, by whichever worker gets it; what a file holds follows from the source and the range alone, so that
a worker that is tried again writes the same. `rag-mm memory build` then reads the files in their order.
Source and output lie where all workers see them under one path.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import array_records, open_documents, webdataset
from rag_mm.memory.writing import ingest_report, stream

LOCAL = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"


@dataclasses.dataclass(frozen=True)
class Range:
    """The records behind position `start`, up to `stop`, which become file `number`."""

    number: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class RangeResult:
    """What became of a range: documents written, bad records, and how often what was done to read them."""

    number: int
    added: int
    rejects: Sequence[stream.Reject]
    notes: dict[str, int]


def ingest(
    spec: str,
    out: pathlib.Path,
    *,
    records_per_file: int = 8192,
    max_bad: float = 0.01,
    beam_options: str = LOCAL,
) -> dict[str, Any]:
    """Runs the pipeline and waits for it.

    Args:
        spec: what `opening.open_documents` reads.
        out: a folder that does not exist yet; `documents-00000.arrayrecord` and so on, `ingest.json`, and
            `rejects.jsonl` where there are any.
        records_per_file: of the source; a tar is one range, however much it holds.
        max_bad: as in `memory.ingest.Options`.
        beam_options: command-line options of Beam.

    Returns:
        The content of `ingest.json`: `read`, `added`, `rejected` by reason, `notes`.

    Raises:
        UserError: Beam is missing, the folder is in use, no good record, or too many bad ones.
    """
    beam = _load_beam()
    if out.exists():
        raise UserError(f"{out} is in the way: name a folder that does not exist yet.")
    ranges = split(open_documents.open_documents(spec), records_per_file)
    if not ranges:
        raise UserError(f"{spec} has no records.")
    out.mkdir(parents=True)
    options = beam.options.pipeline_options.PipelineOptions(shlex.split(beam_options))
    try:
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | "ranges" >> beam.Create(ranges)
                | "spread" >> beam.Reshuffle()
                | "write" >> beam.Map(write_range, spec=spec, out=str(out))
                | "gather" >> beam.combiners.ToList()
                | "sum up" >> beam.Map(write_summary, out=str(out), max_bad=max_bad)
            )
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # Nothing was written: the folder is not in the way of the next try.
        raise
    counts = files.read_json(out / ingest_report.COUNTS)
    if not counts["ok"]:
        raise UserError(
            f"{counts['added']} of {counts['read']} records of {spec} are good, too few for "
            f"--max-bad={max_bad:g}: {out / ingest_report.REJECTS} names the others."
        )
    return counts


def split(source: stream.RecordStream, records_per_file: int) -> list[Range]:
    """Ranges that together are the whole source."""
    if isinstance(source, webdataset.TarSource):
        cuts = source.starts
    elif source.size is not None:
        cuts = [*range(0, source.size, records_per_file), source.size]
    else:
        raise UserError("The source does not say how many records it has; it cannot be cut.")
    pairs = enumerate(itertools.pairwise(cuts))
    return [Range(number, start, stop) for number, (start, stop) in pairs]


def write_range(which: Range, spec: str, out: str) -> RangeResult:
    """Writes one range of a source, on any worker; a range without a good record writes no file."""
    rejects: list[stream.Reject] = []
    notes: dict[str, int] = {}

    def documents() -> Iterator[Any]:
        for item in open_documents.open_documents(spec).read(which.start):
            if item.position > which.stop:
                return
            if item.reject is not None:
                rejects.append(item.reject)
            else:
                yield item.document
            for note in item.notes:
                notes[note] = notes.get(note, 0) + 1

    path = pathlib.Path(out) / f"documents-{which.number:05d}.arrayrecord"
    added = array_records.write_documents(path, documents())
    if not added:
        path.unlink()
    return RangeResult(which.number, added, rejects, notes)


def write_summary(written: Sequence[RangeResult], out: str, max_bad: float) -> None:
    """Writes what all ranges came to."""
    written = sorted(written, key=lambda each: each.number)
    rejects = [reject for each in written for reject in each.rejects]
    added = sum(each.added for each in written)
    notes: dict[str, int] = {}
    for each in written:
        for name, count in each.notes.items():
            notes[name] = notes.get(name, 0) + count
    folder, num_read = pathlib.Path(out), added + len(rejects)
    if rejects:
        ingest_report.write_rejects(folder / ingest_report.REJECTS, rejects)
    counts = {
        "read": num_read,
        "added": added,
        "rejected": stream.count_reasons(rejects),
        "notes": dict(sorted(notes.items())),
        "ok": added > 0 and len(rejects) <= max(max_bad * num_read, int(max_bad > 0)),
    }
    files.write_json(folder / ingest_report.COUNTS, counts)


def _load_beam() -> Any:
    try:
        import apache_beam
        import apache_beam.options.pipeline_options
    except ImportError:
        raise UserError(
            "Apache Beam is not installed: pip install '.[beam]' brings it, in an environment of its own "
            "(docs/beam.md)."
        ) from None
    return apache_beam
