"""`rag-mm tokens`: images as words and back, and what a frozen language model does with the words."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.console

from rag_mm.cli import lm_args, session_args
from rag_mm.core import files, image_files
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.core.document_types import Document

_DOCUMENTS = (
    "examples: a folder with captions.jsonl, .tar or .arrayrecord files, one such file, tfds:NAME:SPLIT, "
    "or scenes:LEVEL/SPLIT/ROLE"
)
# Fields of `ProgressiveConfig`, and the least value of each.
_LEAST = {"segment": 1, "autoregressive_levels": 0, "before": 0, "tokens_per_word": 1}
_TASKS = ("inpaint", "outpaint", "deblur", "rotate", "shift", "text-to-image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="draw an image's words in their cells, level by level, and what they decode to"
    )
    show.add_argument("image", metavar="IMAGE", help="JPEG, PNG or WebP file")
    decode = actions.add_parser("decode", help="make an image of words")
    decode.add_argument("words", metavar="WORDS", help="those of the first level, or first few")
    complete = actions.add_parser(
        "complete",
        help="let a frozen language model write an image's words, beside a majority vote",
        description="Progressive in-context decoding: complete an image, or draw a caption. The examples are "
        "noisy copies of the image, or documents; their majority vote is the baseline.",
    )
    complete.add_argument("image", nargs="?", metavar="IMAGE", help="not for text-to-image")
    complete.add_argument("--task", required=True, choices=_TASKS)
    complete.add_argument("--prompt", help="caption, for text-to-image")
    complete.add_argument("--documents", metavar="SRC", help=f"for text-to-image: {_DOCUMENTS}")
    lm_args.add_lm(complete, "the majority vote alone")
    _add_counts(complete, 10, "examples in context (default: 10)")
    complete.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    complete.add_argument(
        "--segment", type=int, default=4, help="words written per call (default: 4)"
    )
    complete.add_argument(
        "--autoregressive-levels",
        type=int,
        default=3,
        metavar="L",
        help="first levels that are written segment after segment; the others are written at once "
        "(default: 3)",
    )
    complete.add_argument(
        "--before",
        type=int,
        default=16,
        help="words before a segment that its prompt shows, in those first levels (default: 16)",
    )
    complete.add_argument(
        "--tokens-per-word",
        type=int,
        default=3,
        help="tokens of the LM for which a call leaves space, for each word (default: 3)",
    )
    ask = actions.add_parser(
        "ask",
        help="let a frozen language model caption an image, or answer a question about it",
        description="Caption an image, or answer a question about it, after examples. With --question, the "
        "text of each document is a question and, behind its question mark, the answer.",
    )
    ask.add_argument("image", metavar="IMAGE", help="JPEG, PNG or WebP file")
    ask.add_argument("--question", metavar="TEXT", help="(default: caption the image)")
    ask.add_argument("--documents", required=True, metavar="SRC", help=_DOCUMENTS)
    lm_args.add_lm(ask, "", required=True)
    _add_counts(ask, 8, "examples in context (default: 8)")
    ask.add_argument(
        "--levels",
        type=int,
        default=2,
        help="the words of the first few levels stand for an image (default: 2)",
    )
    for action in (show, decode, complete, ask):
        action.add_argument(
            "--workdir", required=True, metavar="RUN", help="finished run of configs/spae.py"
        )
    for action in (complete, ask):
        lm_args.add_limits(action)
    for action in (show, decode, complete):
        action.add_argument("--out", required=True, metavar="PNG", help="output file")


def _add_counts(parser: argparse.ArgumentParser, default: int, text: str) -> None:
    parser.add_argument("--examples", type=int, default=default, metavar="N", help=text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen action. Returns `words` by level, `image` (path written), `figures` or `text`."""
    if args.action != "ask":
        session_args.check_out(args.out)
    actions = {"show": _show, "decode": _decode, "complete": _complete, "ask": _ask}
    return actions[args.action](args)


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import sources

    pixels = sources.load_image(args.image)
    from rag_mm.report import word_figure
    from rag_mm.stages.spae import image_words, word_images

    shown = image_words.describe(word_images.load(args.workdir), pixels)
    files.write_atomic(args.out, word_figure.words_png(shown))
    levels = [
        {
            "words": [list(row) for row in level.words],
            "scores": None if level.scores is None else level.scores.tolist(),
            "psnr": level.psnr,
        }
        for level in shown.levels
    ]
    return {"levels": levels, "image": args.out}


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.stages.spae import image_words, word_images

    decoded = image_words.decode_text(word_images.load(args.workdir), args.words)
    files.write_atomic(args.out, image_files.encode_png(decoded))
    return {"image": args.out}


def _complete(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import sources

    if args.seed < 0:
        raise UserError(f"--seed={args.seed} is negative; give 0 or more.")
    for name, least in _LEAST.items():
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(args, name)}; give at least {least}.")
    limits = lm_args.read_limits(args)
    is_text = args.task == "text-to-image"
    needs = ("prompt", "documents") if is_text else ("image",)
    for name in ("image", "prompt", "documents"):
        if (getattr(args, name) is None) == (name in needs):
            label = "IMAGE" if name == "image" else f"--{name}"
            verb = "needs" if name in needs else "takes no"
            raise UserError(f"--task={args.task} {verb} {label}.")
    pixels = None if is_text else sources.load_image(args.image)
    documents = _documents(args.documents) if is_text else iter(())
    from rag_mm.frozen_lm.progressive import ProgressiveConfig
    from rag_mm.frozen_lm.word_text import one_token_share
    from rag_mm.report import sheets
    from rag_mm.stages.spae import frozen_tasks, word_images

    opened, lm = word_images.load(args.workdir), lm_args.open_lm(args, limits)
    of_lm = {} if lm is None else {"one_token_words": one_token_share(opened.words, lm)}
    config = ProgressiveConfig(**{name: getattr(args, name) for name in _LEAST})
    options: dict[str, Any] = dict(num_examples=args.examples, config=config)
    if pixels is None:
        made = frozen_tasks.draw_caption(opened, args.prompt, documents, lm, **options)
    else:
        options["seed"] = args.seed
        made = frozen_tasks.complete_image(opened, pixels, args.task, lm, **options)
    images = {"given": made.given, "wanted": made.wanted, "LM": made.by_lm}
    images["majority vote"] = made.by_majority
    cells = [(label, image) for label, image in images.items() if image is not None]
    sheet = sheets.contact_sheet([([args.prompt or args.task], cells)])
    files.write_atomic(args.out, image_files.encode_png(np.asarray(sheet)))
    return {"figures": made.figures, "image": args.out, **of_lm}


def _ask(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.data import sources

    pixels = sources.load_image(args.image)
    documents, limits = _documents(args.documents), lm_args.read_limits(args)
    from rag_mm.frozen_lm.word_text import one_token_share
    from rag_mm.stages.spae import frozen_tasks, word_images

    opened, lm = word_images.load(args.workdir), lm_args.open_lm(args, limits)
    assert lm is not None
    share = one_token_share(opened.words, lm)
    text = frozen_tasks.describe_image(
        opened,
        pixels,
        documents,
        lm,
        question=args.question,
        num_examples=args.examples,
        levels=args.levels,
    )
    return {"text": text, "one_token_words": share}


def _documents(spec: str) -> "Iterator[Document]":
    """The good documents of a source, read as far as they are needed."""
    from rag_mm.cli import memory
    from rag_mm.memory.writing import stream

    items = stream.as_source(memory.open_documents(spec)).read(0)
    return (item.document for item in items if item.document is not None)


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the words by level, the figures, or the text; and the path written."""
    lines = []
    for number, level in enumerate(result.get("levels", []), 1):
        words = " ".join(word for row in level["words"] for word in row)
        lines.append(f"level {number} ({level['psnr']:.1f} dB): {words}")
    for name, shares in sorted(result.get("figures", {}).items(), key=lambda item: item[0] != "lm"):
        if isinstance(shares, dict):
            by_level = (
                f"{key} {'-' if share is None else f'{share:.1%}'}" for key, share in shares.items()
            )
            lines.append(f"right codes, {name:<8} {', '.join(by_level)}")
        elif shares is not None:
            lines.append(f"valid words written by the LM: {shares:.1%}")
    lines += lm_args.one_token_line(result.get("one_token_words"))
    lines += [result[key] for key in ("text", "image") if key in result]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
