"""Text output of `rag-mm memory`: hits, documents and statistics, and an HTML contact sheet."""

import pathlib
from typing import Any

import rich.console
import rich.markup
import rich.table

_LISTS = ("rejected", "rejected_by_reason", "excluded", "notes", "last_ingest")
_MAX_REJECTS_SHOWN = 20


def write_sheet(path: pathlib.Path, query: str, result: dict[str, Any]) -> None:
    """Writes the hits as one self-contained HTML page."""
    from rag_mm.core import files
    from rag_mm.report import contact_sheet

    page = contact_sheet.render(query, result["view"], result["hits"])
    files.write_atomic(path, page.encode())


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints hits, problems, or statistics."""
    if "hits" in result:
        _show_hits(result, console)
    elif "segments" in result:
        _show_document(result, console)
    elif "process" in result:
        console.print(f"process {result['process']} has finished.", markup=False)
    elif "problems" in result:
        for problem in result["problems"]:
            console.print(problem, markup=False)
        if result["ok"]:
            console.print(f"{result['memory']}: no problems found.", markup=False)
    else:
        table = rich.table.Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in result.items():
            if key not in _LISTS:
                table.add_row(key, rich.markup.escape(_text(value)))
        console.print(table)
        _show_skipped(result, console)


def _show_skipped(result: dict[str, Any], console: rich.console.Console) -> None:
    rejects = result.get("rejected", ())
    for reject in rejects[:_MAX_REJECTS_SHOWN]:
        line = f"skipped {reject['name']} ({reject['reason']}): {reject['detail']}"
        console.print(line, markup=False)
    if len(rejects) > _MAX_REJECTS_SHOWN:
        by_reason = ", ".join(f"{n} {reason}" for reason, n in result["rejected_by_reason"].items())
        console.print(f"skipped {len(rejects)} in total: {by_reason}", markup=False)
    for reason, count in result.get("excluded", {}).items():
        console.print(f"excluded {count}: {reason}", markup=False)


def _show_hits(result: dict[str, Any], console: rich.console.Console) -> None:
    table = rich.table.Table(box=None)
    for name in ("id", "score", "text", "url", "license"):
        table.add_column(name)
    for hit in result["hits"]:
        cells = [hit["id"], f"{hit['score']:.3f}", hit["text"], hit["url"], hit["license"]]
        table.add_row(*(rich.markup.escape(cell or "-") for cell in cells))
    console.print(table)
    if "html" in result:
        console.print(f"contact sheet: {result['html']}", markup=False)


def _show_document(result: dict[str, Any], console: rich.console.Console) -> None:
    for key in ("id", "row", "url", "license"):
        console.print(f"{key}: {_text(result[key])}", markup=False)
    for i, segment in enumerate(result["segments"]):
        kind = next(kind for kind in ("text", "image", "video") if kind in segment)
        value = segment["text"] if kind == "text" else " x ".join(map(str, segment[kind]))
        rate = f" at {segment['fps']:g} frames per second" if kind == "video" else ""
        console.print(f"{i} {kind}: {value}{rate}", markup=False)
        for tokenizer, shape in segment.get("codes", {}).items():
            number = " x ".join(map(str, shape))
            console.print(f"    {number} codes of {tokenizer[:12]}", markup=False)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{number} of {name[:12]}" for name, number in value.items()) or "-"
    return "-" if value is None else str(value)
