"""The `rag-mm` command: one module per subcommand; a user error is one sentence and exit code 2.

Subcommand NAME is the module NAME of `rag_mm.cli` (`import_` for `import`), imported only when chosen:
    add_arguments(parser)   declares its options
    run(args) -> dict       does the work; --json prints the result; `"ok": False` exits with 1
    show(result, console)   prints the result for people, on a rich Console on stdout
A subcommand that declares `--config` gets each `--config.key=value` in `args.overrides`, key -> text.
"""

import argparse
import dataclasses
import difflib
import glob
import importlib
import json
import keyword
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

import rag_mm
from rag_mm.cli import failures, remote_paths, streams
from rag_mm.core import renames, terminal
from rag_mm.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """A line for `rag-mm --help`, and examples for `rag-mm COMMAND --help`."""

    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "quickstart": Command(
        "train and evaluate RA-CM3 in miniature on emoji scenes, on two CPU cores, and write a report",
        (
            "rag-mm quickstart",
            "rag-mm quickstart --workdir=runs/tiny --config=configs/quickstart.py:tiny",
        ),
    ),
    "train": Command(
        "run all stages of a config in order, or one of them",
        (
            "rag-mm train --config=configs/quickstart.py:quick --workdir=runs/quickstart",
            "rag-mm train --config=configs/quickstart.py:quick --show",
            "rag-mm train --config=configs/quickstart.py --workdir=runs/a --stage=tokenizer",
            "rag-mm train --config=configs/quickstart.py --workdir=runs/a --tracker=trackio",
            "rag-mm train --config=configs/quickstart.py --workdir=/shared/a "
            "--coordinator=10.0.0.1:8476 --num-processes=2 --process-id=0",
        ),
    ),
    "ablate": Command(
        "train a config's variants at several seeds and compare them, paired by test document",
        (
            "rag-mm ablate --config=configs/copy_probe.py:quick --workdir=runs/ablation",
            "rag-mm ablate --config=configs/copy_probe.py:quick --workdir=runs/ablation --seeds 0 1 2",
        ),
    ),
    "eval": Command(
        "run a published evaluation protocol on a run and your own images",
        (
            "rag-mm eval --suite=zeroshot --workdir=runs/reco --images=photos",
            "rag-mm eval --suite=zeroshot --workdir=runs/reco --dataset=cars196 --memory=mem",
            "rag-mm eval --suite=fewshot --workdir=runs/spae --images=photos --ways=5 --shots=1",
            "rag-mm eval --suite=fewshot --workdir=runs/spae --images=photos --ways=2 --shots=3 "
            "--top=1 --labels=nouns --lm=runs/smollm",
            "rag-mm eval --suite=fewshot --workdir=runs/spae --images=photos "
            "--lm=http://localhost:8000/v1#smollm --timeout=120 --max-calls=500",
            "rag-mm eval --suite=fewshot --workdir=runs/spae --against=runs/plain "
            "--images=scenes:easy/test/test",
            "rag-mm eval --suite=vqa --workdir=runs/sft --documents=vqav2:data/vqa",
            "rag-mm eval --suite=caption --workdir=runs/sft --documents=coco-captions:data/coco --limit=1000",
            "rag-mm eval --suite=edit --workdir=runs/sft --documents=scenes:easy/test/test",
        ),
    ),
    "tokens": Command(
        "images as words of a language model and back, and what a frozen one does with them",
        (
            "rag-mm tokens show apple.png --workdir=runs/spae --out=words.png",
            'rag-mm tokens decode "red apple fruit tree leaf" --workdir=runs/spae --out=b.png',
            "rag-mm tokens complete apple.png --task=inpaint --workdir=runs/spae --lm=runs/smollm "
            "--out=c.png",
            'rag-mm tokens complete --task=text-to-image --prompt="red apple" --documents=photos '
            "--workdir=runs/spae --lm=runs/smollm --out=d.png",
            "rag-mm tokens ask apple.png --documents=photos --workdir=runs/spae --lm=runs/smollm",
        ),
    ),
    "memory": Command(
        "build, extend, search and check a retrieval memory",
        (
            "rag-mm memory build --documents=photos --retriever=runs/quickstart --out=mem",
            'rag-mm memory search mem --text="a red apple" -k 5',
            "rag-mm memory verify mem",
        ),
    ),
    "corpus": Command(
        "documents as text ids and image codes on disk, and their neighbors in a memory, for training",
        (
            "rag-mm corpus build --documents=tars --tokenizer=runs/quickstart --out=corpus",
            "rag-mm corpus build --documents web.parquet photos --tokenizer=runs/quickstart --out=corpus",
            "rag-mm corpus neighbors corpus --memory=mem --max-similarity=0.9",
            "rag-mm corpus stats corpus",
        ),
    ),
    "explore": Command(
        "local web page: search a run's memory and try its models",
        (
            "rag-mm explore runs/quickstart",
            "rag-mm explore runs/quickstart --port=0",
            "rag-mm explore runs/sft --stage=sft",
        ),
    ),
    "bench": Command(
        "compare speed with a peer library or a device's published peak",
        (
            "rag-mm bench memory --rows=300000 --json",
            "rag-mm bench corpus --documents=1000000 --json",
            "rag-mm bench train --against=transformers --json",
            "rag-mm bench train --against=unguarded --widths 192 768",
            "rag-mm bench train --against=peak --size=7b --remat=full",
            "rag-mm bench decode --against=transformers --json",
            "rag-mm bench decode --against=peak --size=7b",
        ),
    ),
    "generate": Command(
        "generate images from a caption and the documents retrieved for it",
        (
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --out=apple.png',
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --docs=0 --out=b.png',
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --temperature=1 '
            "--guidance=1.5 --plausible=0.1 --out=c.png",
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --temperature=1 '
            "--guidance=1.5 --contrast=1 --best-of=8 --out=d.png",
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --decoding=jacobi --out=e.png',
            'rag-mm generate --workdir=runs/sft --prompt="on a red background" --boxes=boxes.json '
            "--out=f.png",
            'rag-mm generate --workdir=runs/sft --prompt="apple on a red background" '
            "--structure=edges.png --feature=edges --num=4 --sheet=g.png --out=h.png",
        ),
    ),
    "edit": Command(
        "change an image as a text says, with a decoder tuned on instructions",
        (
            'rag-mm edit --workdir=runs/sft --image=a.png --prompt="change the background to red" '
            "--out=b.png",
            'rag-mm edit --workdir=runs/sft --image=a.png --image=b.png --prompt="replace the apple" '
            "--image-guidance=1.5 --num=4 --sheet=c.png --out=d.png",
        ),
    ),
    "caption": Command(
        "caption an image",
        ("rag-mm caption --workdir=runs/quickstart --image=apple.png",),
    ),
    "ask": Command(
        "answer a question about an image, with a decoder tuned on instructions",
        (
            'rag-mm ask --workdir=runs/sft --image=a.png --question="what is at the top left?"',
            'rag-mm ask --workdir=runs/sft --image=a.png --question="which color is the background?" '
            "--docs=0",
            'rag-mm ask --workdir=runs/emu_sft --image a.png b.png --question="what moves?"',
        ),
    ),
    "chat": Command(
        "talk about images with an Emu tuned on instructions, one line of stdin after the other",
        (
            "rag-mm chat --workdir=runs/emu_sft --image=a.png",
            "rag-mm chat --workdir=runs/emu_sft --image=a.png --docs=1 --json",
        ),
    ),
    "infill": Command(
        "regenerate a band of an image from the rest of the image and a caption",
        (
            'rag-mm infill --workdir=runs/quickstart --image=a.png --prompt="red apple" '
            "--rows=8:24 --out=b.png",
        ),
    ),
    "plan": Command(
        "compile ahead of time for a TPU topology: memory, collectives, MFU bound",
        (
            "rag-mm plan --config=configs/cm3leon.py:7b --topology=v5e:16x16",
            "rag-mm plan --config=configs/cm3leon.py:7b --topology=v5p:4x4x4 --search",
            "rag-mm plan --config=configs/cm3leon.py:760m --topology=v5e:2x4 --decode",
            "rag-mm plan --memory=1000000000x512 --topology=v5e:16x16",
        ),
    ),
    "import": Command(
        "convert a public CLIP, LLaMA, Chameleon, Emu or image tokenizer (safetensors) into a run",
        (
            "rag-mm import clip clip-vit-base-patch32 --out=runs/clip",
            "rag-mm import llama TinyLlama-1.1B --out=runs/llama --dtype=float32",
            "rag-mm import image-tokenizer Janus-Pro-1B --out=runs/janus_vq",
            "rag-mm import chameleon chameleon-7b --out=runs/chameleon",
            "rag-mm import emu emu-folder --out=runs/emu",
        ),
    ),
    "export": Command(
        "write a run's model as safetensors that from_pretrained loads",
        (
            "rag-mm export llama runs/llama out",
            "rag-mm export cm3 runs/quickstart out --dtype=bfloat16 --shard-size=2GB",
            "rag-mm export cm3 runs/quickstart out --card --license=apache-2.0",
        ),
    ),
    "doctor": Command(
        "check this machine: versions, devices, flags, disk space",
        ("rag-mm doctor", "rag-mm doctor --json"),
    ),
}


INTERRUPTED = 130
"""Exit code for Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors as UserError; its subparsers do too."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage and exiting."""
        raise UserError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; by default those of the process, which is then prepared for any terminal, and on
            Ctrl-C ended at once: threads of libraries would end it by a segmentation fault.

    Returns:
        Exit code: 0 for success, 1 for a failed check or a diverged run, 2 for a user error, 130 for Ctrl-C.
    """
    if argv is not None:
        return _run(list(argv))
    streams.prepare()
    code = _run(sys.argv[1:])
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str]) -> int:
    try:
        try:
            return _main(argv)
        finally:
            streams.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = explain(error)
        if code is None:
            raise
        return code


def explain(error: BaseException) -> int | None:
    """Prints the error as one sentence on stderr. Returns the exit code, or None for a bug (no output)."""
    match error:
        case UserError():
            message, code = f"{error}", 2
        case FloatingPointError():
            message, code = f"{error}; a smaller learning_rate may help.", 1
        case KeyboardInterrupt():
            message, code = "interrupted.", INTERRUPTED
        case BrokenPipeError():
            # The reader of stdout has exited; without this Python reports the error again at exit.
            streams.discard_stdout()
            return 0
        case OSError(filename=filename) if filename is not None:
            message, code = f"{os.fsdecode(filename)}: {error.strerror}.", 2
        case _:
            reason = failures.why_disk_refuses(error) or failures.why_no_device(error)
            if reason is None:
                return None
            message, code = reason, 2
    print(f"rag-mm: {terminal.printable(message)}", file=sys.stderr)
    return code


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(rag_mm.__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        choices = f"the commands are {', '.join(COMMANDS)}."
        hint = f"did you mean {similar[0]!r}?" if similar else choices
        raise UserError(f"There is no command {name!r}; {hint}")
    choose_platform()
    module = load_command(name)
    args = _parse(name, module, argv[1:])
    remote_paths.check(name, args)
    with streams.stdout_for_result(args.json):
        result = module.run(args)
    if args.json:
        print(json.dumps(result, allow_nan=False), flush=True)
    else:
        module.show(terminal.printable(result), streams.make_console())
    return 1 if result.get("ok") is False else 0


def load_command(name: str) -> types.ModuleType:
    """The module of a subcommand; the name of a Python keyword gets a trailing underscore."""
    return importlib.import_module(f"rag_mm.cli.{name}{'_' * keyword.iskeyword(name)}")


def choose_platform() -> None:
    """Keeps jax on the CPU where no accelerator is present; call it before jax is imported.

    An installed libtpu would otherwise search for a TPU for minutes. A JAX_PLATFORMS that is set wins.
    """
    devices = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
    if any(glob.glob(pattern) for pattern in devices):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    examples = [f"  {command.examples[0]}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: rag-mm COMMAND [--json] ...",
            "",
            "Retrieval-augmented multimodal models in JAX.",
            "",
            "commands (see rag-mm COMMAND --help):",
            *lines,
            "",
            "examples:",
            *examples,
            "",
            "With --json, a command prints exactly one JSON object on stdout.",
        ]
    )


def _parse(name: str, module: Any, argv: list[str]) -> argparse.Namespace:
    command = COMMANDS[name]
    parser = Parser(
        prog=f"rag-mm {name}",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog="\n".join(["examples:", *(f"  {example}" for example in command.examples)]),
    )
    parser.add_argument(
        "--json", action="store_true", help="print exactly one JSON object on stdout"
    )
    module.add_arguments(parser)
    # Removed before parsing: argparse would not accept it after a nested subcommand.
    end = argv.index("--") if "--" in argv else len(argv)
    as_json = "--json" in argv[:end]
    rest = [arg for i, arg in enumerate(argv) if i >= end or arg != "--json"]
    args, extra = parser.parse_known_args(rest)
    args.json = as_json
    args.overrides = {}
    for arg in extra:
        key, equals, value = arg.removeprefix("--config.").partition("=")
        if not arg.startswith("--config.") or not hasattr(args, "config"):
            hint = renames.hint(f"rag-mm {name} {arg.partition('=')[0]}")
            parser.error(f"unknown argument {arg!r}{hint}")
        if not equals or not key:
            parser.error(f"{arg} has no value; write --config.key=value")
        args.overrides[key] = value
    return args
