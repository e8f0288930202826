"""`rag-mm memory`: build, extend, search and check a retrieval memory by hand."""

import argparse
import base64
import pathlib
from typing import TYPE_CHECKING, Any

import rich.console
import rich.markup
import rich.table

from rag_mm.core import progress
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.memory.encoder import Encoder, Tokenizer
    from rag_mm.memory.writer import Documents

_DOCUMENTS = "a folder with captions.jsonl, or scenes:LEVEL/SPLIT[+SPLIT]/ROLE"
_SCENES = "scenes:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="make a memory of documents")
    build.add_argument("--documents", required=True, help=_DOCUMENTS)
    build.add_argument("--retriever", required=True, metavar="RUN", help="a run with a retriever")
    build.add_argument("--out", required=True, metavar="MEM", help="the memory's folder")
    build.add_argument("--index", default="scann", help="scann (default) or exact")
    add = actions.add_parser("add", help="add documents, as a new version")
    add.add_argument("memory", metavar="MEM")
    add.add_argument("--documents", required=True, help=_DOCUMENTS)
    search = actions.add_parser("search", help="find documents")
    search.add_argument("memory", metavar="MEM")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="what to look for; searches the view mixed")
    query.add_argument("--image", help="a picture to look for; searches the view image")
    search.add_argument("--view", help="image, text or mixed")
    search.add_argument("-k", type=int, default=5, help="how many hits (default: 5)")
    verify = actions.add_parser("verify", help="check every file; exit code 1 if one is wrong")
    verify.add_argument("memory", metavar="MEM")
    stats = actions.add_parser("stats", help="say what a memory holds")
    stats.add_argument("memory", metavar="MEM")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does the chosen action; `hits`, `problems`, or what `Memory.stats` says."""
    actions = {
        "build": _build,
        "add": _add,
        "search": _search,
        "verify": _verify,
        "stats": _stats,
    }
    if args.action != "build" and (pathlib.Path(args.memory) / "config.json").exists():
        raise UserError(f"{args.memory} is a run; name its memory, {args.memory}/memory.")
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import memory, writer

    retriever = pathlib.Path(args.retriever)
    if not retriever.is_dir():
        raise UserError(f"There is no run {args.retriever}; name one with a trained retriever.")
    out = pathlib.Path(args.out)
    if (out / "config.json").exists():  # A memory's leftovers and a run have names in common.
        raise UserError(f"--out={args.out} is in the way: a run or a model. Name another folder.")
    writer.check_vacant(out, ("retriever", "tokenizer"))
    documents, rejects = _open_documents(args.documents)
    encoder, tokenizer = load_encoder(retriever), None
    # A run keeps its models deeper than a folder that is nothing but a model.
    weights = {name: retriever / name / "frozen" for name in ("retriever", "tokenizer")}
    carried = {"retriever": retriever}
    carried |= {name: folder for name, folder in weights.items() if folder.is_dir()}
    if "tokenizer" in carried:
        tokenizer = load_tokenizer(retriever)
    with progress.track("documents", len(documents)) as bar:
        options = writer.Options(index=args.index, on_progress=lambda done, _: bar.update(done))
        built = memory.Memory.build(
            out, documents, encoder, tokenizer, carried=carried, options=options
        )
    return {**built.stats(), "added": len(documents), "rejected": rejects}


def _add(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import memory, writer

    before = memory.Memory.open(args.memory)
    documents, rejects = _open_documents(args.documents)
    before.attach(load_encoder(before.carried("retriever")))
    tokenizer = None
    if before.manifest.tokenizer is not None:
        tokenizer = load_tokenizer(before.carried("tokenizer"))
    with progress.track("documents", len(documents)) as bar:
        options = writer.Options(on_progress=lambda done, _: bar.update(done))
        after = before.add(documents, tokenizer, options=options)
    return {**after.stats(), "added": len(documents), "rejected": rejects}


def _search(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import sources
    from rag_mm.memory import encoder, images, memory

    if args.k < 1:
        raise UserError(f"-k is {args.k}; ask for at least 1 hit.")
    if args.text is not None and not args.text.strip():
        raise UserError("--text is empty; say what to look for.")
    view = args.view or ("mixed" if args.image is None else "image")
    encoder.check_view(view)
    image = None if args.image is None else sources.load_image(args.image)
    opened = memory.Memory.open(args.memory)
    opened.attach(load_encoder(opened.carried("retriever")))
    found = opened.search(text=args.text, image=image, view=view, k=args.k)
    hits = []
    for row, score in zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True):
        if row < 0:
            continue
        document = opened.document(row)
        picture = None if document.image is None else images.encode_png(document.image)
        hits.append(
            {
                "id": document.id,
                "score": score,
                "text": document.text,
                "image": None if picture is None else _data_url(picture),
                "url": document.url,
                "license": document.license,
                "row": row,
            }
        )
    return {"memory": str(args.memory), "view": view, "hits": hits}


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import verify

    problems = verify.verify(pathlib.Path(args.memory))
    return {"memory": str(args.memory), "ok": not problems, "problems": problems}


def _stats(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.memory import memory

    return memory.Memory.open(args.memory).stats()


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints hits, problems, or what the memory holds."""
    if "hits" in result:
        _show_hits(result, console)
    elif "problems" in result:
        for problem in result["problems"]:
            console.print(problem, markup=False)
        if result["ok"]:
            console.print(f"{result['memory']}: nothing is wrong.", markup=False)
    else:
        table = rich.table.Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in result.items():
            if key != "rejected":
                table.add_row(key, rich.markup.escape(_text(value)))
        console.print(table)
        for reject in result.get("rejected", ()):
            console.print(f"skipped {reject['name']}: it {reject['reason']}", markup=False)


def _show_hits(result: dict[str, Any], console: rich.console.Console) -> None:
    table = rich.table.Table(box=None)
    for name in ("id", "score", "text", "url", "license"):
        table.add_column(name)
    for hit in result["hits"]:
        cells = [hit["id"], f"{hit['score']:.3f}", hit["text"], hit["url"], hit["license"]]
        table.add_row(*(rich.markup.escape(cell or "-") for cell in cells))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _open_documents(spec: str) -> "tuple[Documents, list[dict[str, str]]]":
    if spec.startswith(_SCENES):
        from rag_mm.worlds.emoji import scenes

        return scenes.open_documents(spec.removeprefix(_SCENES)), []
    from rag_mm.data import sources

    documents = sources.FolderDocuments(spec)
    return documents, [{"name": name, "reason": reason} for name, reason in documents.rejects]


def load_encoder(folder: pathlib.Path) -> "Encoder":
    """The retriever of a run or of a memory's `retriever` folder."""
    from rag_mm.stages import retriever

    return retriever.load_encoder(folder)


def load_tokenizer(folder: pathlib.Path) -> "Tokenizer":
    """The image tokenizer of a run or of a memory's `tokenizer` folder."""
    from rag_mm.stages import tokenizer

    return tokenizer.load_tokenizer(folder)
