"""Distributed ingestion: an Apache Beam pipeline that checks records and rewrites them as ArrayRecord files.

The source is split into ranges of positions. A worker reads and checks each range and writes it as one
ArrayRecord file. The file depends only on the source and the range, so a retried worker writes the same
bytes. `rag-mm memory build` then reads the files in order. All workers must see source and output under the
same paths.
"""

import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import array_records, open_documents, source_ranges
from rag_mm.memory.writing import ingest_report, stream

LOCAL = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"


@dataclasses.dataclass(frozen=True)
class RangeResult:
    """The outcome of a range: number of documents written, bad records, and counts of notes."""

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
    """Runs the pipeline and waits for it to finish.

    Args:
        spec: the documents, as accepted by `open_documents.open_documents`.
        out: a folder that does not exist yet. Gets `documents-00000.arrayrecord` and so on, `ingest.json`,
            and `rejects.jsonl` if there are rejects.
        records_per_file: source records per file; a tar is always one range, whatever its size.
        max_bad: as in `ingest.Options`.
        beam_options: command-line options for Beam.

    Returns:
        The content of `ingest.json`: `read`, `added`, `rejected` by reason, `notes`, `ok`.

    Raises:
        UserError: Beam is not installed, the folder exists, there is no good record, or too many are bad.
    """
    beam = _load_beam()
    if out.exists():
        raise UserError(f"{out} is in the way: name a folder that does not exist yet.")
    ranges = source_ranges.split(open_documents.open_documents(spec), records_per_file)
    if not ranges:
        raise UserError(f"{spec} has no records.")
    out.mkdir(parents=True)
    options = beam.options.pipeline_options.PipelineOptions(shlex.split(beam_options))
    try:
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | "ranges" >> beam.Create(ranges)
                | "reshuffle" >> beam.Reshuffle()
                | "write" >> beam.Map(write_range, spec=spec, out=str(out))
                | "gather" >> beam.combiners.ToList()
                | "summarize" >> beam.Map(write_summary, out=str(out), max_bad=max_bad)
            )
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # If nothing was written, the next attempt can use the folder.
        raise
    counts = files.read_object(out / ingest_report.COUNTS)
    if not counts["ok"]:
        raise UserError(
            f"{counts['added']} of {counts['read']} records of {spec} are good, too few for "
            f"--max-bad={max_bad:g}: {out / ingest_report.REJECTS} lists the others."
        )
    return counts


def write_range(which: source_ranges.Range, spec: str, out: str) -> RangeResult:
    """Writes one range of a source; runs on any worker. A range without good records writes no file."""
    rejects: list[stream.Reject] = []
    notes: dict[str, int] = {}

    def documents() -> Iterator[Any]:
        for item in source_ranges.read(open_documents.open_documents(spec), which):
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


def write_summary(results: Sequence[RangeResult], out: str, max_bad: float) -> None:
    """Writes the total counts and rejects of all ranges."""
    results = sorted(results, key=lambda result: result.number)
    rejects = [reject for result in results for reject in result.rejects]
    added = sum(result.added for result in results)
    notes: dict[str, int] = {}
    for result in results:
        for name, count in result.notes.items():
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
            "Apache Beam is not installed: run pip install '.[beam]' in a separate environment "
            "(docs/beam.md)."
        ) from None
    return apache_beam
