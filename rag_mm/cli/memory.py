"""`rag-mm memory`: build, change, search, show and verify a retrieval memory."""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import rich.console

from rag_mm.cli import memory_show, process_args
from rag_mm.cli.memory_arguments import add_arguments
from rag_mm.core import progress
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.memory.model_protocols import Encoder
    from rag_mm.memory.retrieval_memory import Memory
    from rag_mm.memory.writing.stream import Documents, RecordStream
    from rag_mm.memory.writing.writer import Options
    from rag_mm.stages.shared.frozen import FrozenTokenizer

__all__ = ["add_arguments", "load_encoder", "load_tokenizer", "open_documents", "run", "show"]

_SCENES = "scenes:"
_TOKENIZER = "tokenizer/frozen"  # in a run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen action. Returns `hits`, `problems`, or the memory's statistics (`Memory.stats`)."""
    actions = {
        "ingest": _ingest,
        "build": _build,
        "add": _add,
        "remove": _remove,
        "merge": _merge,
        "compact": _compact,
        "add-codes": _add_codes,
        "show": _show,
        "search": _search,
        "verify": _verify,
        "stats": _stats,
    }
    if (
        args.action not in ("ingest", "build")
        and (pathlib.Path(args.memory) / "config.json").exists()
    ):
        raise UserError(f"{args.memory} is a run; give its memory, {args.memory}/memory.")
    return actions[args.action](args)


def _ingest(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import beam_ingest

    if args.records_per_file < 1:
        raise UserError(f"--records-per-file is {args.records_per_file}; give at least 1.")
    check_share("max_bad", args.max_bad)
    counts = beam_ingest.ingest(
        args.documents,
        pathlib.Path(args.out),
        records_per_file=args.records_per_file,
        max_bad=args.max_bad,
        beam_options=args.beam or beam_ingest.LOCAL,
    )
    return {"out": args.out, **counts}


def check_share(name: str, value: float) -> None:
    """Raises UserError unless an option's value is a share."""
    if not 0 <= value <= 1:
        option = name.replace("_", "-")
        raise UserError(f"--{option} is {value}; give a share from 0 to 1.")


def check_image_batch(args: argparse.Namespace) -> None:
    """Raises UserError if --image-batch is too small."""
    if args.image_batch is not None and args.image_batch < 1:
        raise UserError(f"--image-batch is {args.image_batch}; give at least 1.")


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raises UserError if --tokenizer names no run with an image tokenizer."""
    if args.tokenizer is not None and not (pathlib.Path(args.tokenizer) / _TOKENIZER).is_dir():
        raise UserError(f"--tokenizer={args.tokenizer} is not a run with an image tokenizer.")


def _build(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory.writing import writer

    retriever = pathlib.Path(args.retriever)
    if not retriever.is_dir():
        raise UserError(f"There is no run {args.retriever}; give one with a trained retriever.")
    check_tokenizer(args)
    out = pathlib.Path(args.out)
    if (out / "config.json").exists():  # An unfinished memory shares file names with a run.
        raise UserError(f"--out={args.out} already holds a run or a model; choose another folder.")
    process_args.check_arguments(args)
    check_image_batch(args)
    writer.check_vacant(out, ("retriever", "tokenizer"))
    documents = open_documents(args.documents)
    # Join only after the checks above: a process that exits early would leave the others waiting.
    with process_args.joined(args):
        return _build_joined(args, retriever, out, documents)


def _build_joined(
    args: argparse.Namespace,
    retriever: pathlib.Path,
    out: pathlib.Path,
    documents: "Documents | RecordStream",
) -> dict[str, Any]:
    import jax

    from rag_mm.memory import retrieval_memory, shared_encoding

    encoder, tokenizer = load_encoder(retriever, args.image_batch), None
    # In a run the weights are in a subfolder; a folder that holds only a model has no such subfolder.
    tokenizer_run = pathlib.Path(args.tokenizer or retriever)
    weights = {
        "retriever": retriever / "retriever" / "frozen",
        "tokenizer": tokenizer_run / _TOKENIZER,
    }
    carried = {"retriever": retriever}
    carried |= {name: folder for name, folder in weights.items() if folder.is_dir()}
    if "tokenizer" in carried:
        tokenizer = load_tokenizer(tokenizer_run, args.image_batch)
    if jax.process_index():
        shared_encoding.follow(encoder, tokenizer)
        return {"process": jax.process_index()}
    with (
        shared_encoding.lead(encoder, tokenizer) as (led, led_tokenizer),
        _ingestion(args, documents, led) as options,
    ):
        built = retrieval_memory.Memory.build(
            out, documents, led, led_tokenizer, carried=carried, options=options
        )
    return _ingested(built, args.rejects)


def _add(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    check_image_batch(args)
    before = retrieval_memory.Memory.open(args.memory)
    documents = open_documents(args.documents)
    before.attach(load_encoder(before.carried("retriever"), args.image_batch))
    tokenizer = None
    if before.manifest.tokenizer is not None:
        tokenizer = load_tokenizer(before.carried("tokenizer"), args.image_batch)
    with _ingestion(args, documents, before.encoder) as options:
        after = before.add(documents, tokenizer, options=options)
    return _ingested(after, args.rejects)


@contextlib.contextmanager
def _ingestion(
    args: argparse.Namespace,
    documents: "Documents | RecordStream",
    encoder: "Encoder",
) -> "Iterator[Options]":
    """The ingestion options from the arguments, with a progress bar; writes --rejects on failure too."""
    from rag_mm.memory import shared_encoding
    from rag_mm.memory.writing import ingest_report, near_duplicates, writer

    for name in ("max_bad", "similarity"):
        check_share(name, getattr(args, name))
    excluded = None
    if args.exclude is not None:
        excluded = near_duplicates.ExclusionSet.from_documents(
            open_documents(args.exclude), encoder, args.similarity
        )
    size = getattr(documents, "size", None) or 0
    with progress.track("documents", size) as bar:
        try:
            yield writer.Options(
                index=getattr(args, "index", "scann"),
                batch_size=shared_encoding.documents_at_once(encoder),
                on_progress=lambda done, _: bar.update(done),
                max_bad=args.max_bad,
                exclude=excluded,
                dedup=args.similarity if args.dedup else None,
            )
        except ingest_report.TooManyRejects as error:
            if args.rejects is not None:
                ingest_report.write_rejects(pathlib.Path(args.rejects), error.rejects)
            raise


def _ingested(memory: "Memory", rejects_file: str | None) -> dict[str, Any]:
    from rag_mm.memory.writing import ingest_report

    counts, rejects = ingest_report.read(memory.path, memory.manifest)
    if rejects_file is not None:
        ingest_report.write_rejects(pathlib.Path(rejects_file), rejects)
    return {
        **memory.stats(),
        "added": counts["added"],
        "rejected": [dataclasses.asdict(reject) for reject in rejects],
        "rejected_by_reason": counts["rejected"],
        "excluded": counts["excluded"],
        "notes": counts["notes"],
    }


def _remove(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    before = retrieval_memory.Memory.open(args.memory)
    after = before.remove(args.id, args.url, args.license)
    return {**after.stats(), "taken_out": len(before) - len(after)}


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    memory, other = (
        retrieval_memory.Memory.open(args.memory),
        retrieval_memory.Memory.open(args.other),
    )
    with progress.track("documents", len(other)) as bar:
        after = memory.merge(other, on_progress=lambda done, _: bar.update(done))
    return {**after.stats(), "added": len(other)}


def _compact(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    before = retrieval_memory.Memory.open(args.memory)
    with progress.track("documents", len(before)) as bar:
        after = before.compact(args.prune, on_progress=lambda done, _: bar.update(done))
    return after.stats()


def _add_codes(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    check_image_batch(args)
    check_tokenizer(args)
    before = retrieval_memory.Memory.open(args.memory)
    folder = pathlib.Path(args.tokenizer) if args.tokenizer else before.carried("tokenizer")
    tokenizer = load_tokenizer(folder, args.image_batch)
    with progress.track("documents", len(before)) as bar:
        after = before.add_codes(tokenizer, on_progress=lambda done, _: bar.update(done))
    return {**after.stats(), "added_codes": tokenizer.fingerprint}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import hits, retrieval_memory

    opened = retrieval_memory.Memory.open(args.memory)
    return {"memory": str(args.memory), **hits.describe_record(opened, _row(opened, args))}


def _row(opened: "Memory", args: argparse.Namespace) -> int:
    if args.document not in opened.ids:
        raise UserError(f"{args.memory} has no document with the id {args.document!r}.")
    return opened.ids.index(args.document)


def _search(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import sources
    from rag_mm.memory import hits, model_protocols, retrieval_memory
    from rag_mm.memory.index import protocol

    if not 1 <= args.k <= protocol.MAX_HITS:
        raise UserError(f"-k is {args.k}; give 1 to {protocol.MAX_HITS:,}.")
    if args.text is not None and not args.text.strip():
        raise UserError("--text is empty; give a query.")
    view = args.view or ("mixed" if args.image is None else "image")
    model_protocols.check_view(view)
    image = None if args.image is None else sources.load_image(args.image)
    opened = retrieval_memory.Memory.open(args.memory)
    if args.document is not None:
        row = _row(opened, args)
        results = opened.search(vectors=opened.embeddings(view)[row][None], view=view, k=args.k)
    else:
        opened.attach(load_encoder(opened.carried("retriever")))
        results = opened.search(text=args.text, image=image, view=view, k=args.k)
    result = {"memory": str(args.memory), "view": view, "hits": hits.describe(opened, results)}
    if args.html is not None:
        query = args.text or args.image or f"document {args.document}"
        memory_show.write_sheet(pathlib.Path(args.html), query, result)
        result["html"] = str(args.html)
    return result


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory.store import verify

    problems = verify.verify(pathlib.Path(args.memory))
    return {"memory": str(args.memory), "ok": not problems, "problems": problems}


def _stats(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import retrieval_memory

    return retrieval_memory.Memory.open(args.memory).stats()


def show(result: dict[str, Any], console: "rich.console.Console") -> None:
    """Prints hits, problems, or statistics."""
    memory_show.show(result, console)


def open_documents(spec: str) -> "Documents | RecordStream":
    """Opens what a `--documents` names, scenes of the emoji world included."""
    if spec.startswith(_SCENES):
        from rag_mm.worlds.emoji import emoji_scenes

        return emoji_scenes.open_documents(spec.removeprefix(_SCENES))
    from rag_mm.data import open_documents as sources

    return sources.open_documents(spec)


def load_encoder(folder: pathlib.Path, image_batch: int | None = None) -> "Encoder":
    """Loads the retriever of a run, or of a memory's `retriever` folder."""
    from rag_mm.stages.shared import train_retriever

    return train_retriever.load_encoder(folder, image_batch)


def load_tokenizer(folder: pathlib.Path, image_batch: int | None = None) -> "FrozenTokenizer":
    """Loads the image tokenizer of a run, or of a memory's `tokenizer` folder."""
    from rag_mm.stages.shared import train_tokenizer

    return train_tokenizer.load_tokenizer(folder, image_batch)
