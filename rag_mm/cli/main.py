"""The command `rag-mm`: picks one command's module, and turns a user's mistake into exit code 2.

A command NAME is the module `rag_mm.cli.NAME` (`import` is `import_`), imported when it is chosen:
    add_arguments(parser)   declares its arguments
    run(args) -> dict       does the work, and --json prints what it returns; `"ok": False` exits 1
    show(result, console)   the same for people, on a rich Console on stdout
A command that declares `--config` finds `--config.key=value` in `args.overrides`, key -> text.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import glob
import importlib
import json
import keyword
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import rag_mm
from rag_mm.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """One line for the list and examples for the command's own help."""

    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "quickstart": Command(
        "the whole chain on emoji scenes, on two CPU cores, with a report at the end",
        (
            "rag-mm quickstart",
            "rag-mm quickstart --workdir=runs/tiny --config=configs/quickstart.py:tiny",
        ),
    ),
    "train": Command(
        "run a config's stages in order, or one of them",
        (
            "rag-mm train --config=configs/quickstart.py:quick --workdir=runs/quickstart",
            "rag-mm train --config=configs/quickstart.py --workdir=runs/a --stage=tokenizer",
            "rag-mm train --config=configs/quickstart.py --workdir=/shared/a "
            "--coordinator=10.0.0.1:8476 --num-processes=2 --process-id=0",
        ),
    ),
    "ablate": Command(
        "run a config's variants at several seeds, and compare them document by document",
        (
            "rag-mm ablate --config=configs/copy_probe.py:quick --workdir=runs/ablation",
            "rag-mm ablate --config=configs/copy_probe.py:quick --workdir=runs/ablation --seeds 0 1 2",
        ),
    ),
    "eval": Command(
        "a published protocol on a run and pictures of your own",
        (
            "rag-mm eval --suite=zeroshot --workdir=runs/reco --images=pictures",
            "rag-mm eval --suite=zeroshot --workdir=runs/reco --dataset=cars196 --memory=mem",
        ),
    ),
    "memory": Command(
        "build, extend, search and check a retrieval memory",
        (
            "rag-mm memory build --documents=pictures --retriever=runs/quickstart --out=mem",
            'rag-mm memory search mem --text="a red apple" -k 5',
            "rag-mm memory verify mem",
        ),
    ),
    "explore": Command(
        "a local page: search a run's memory, and see what its models make of a text or a picture",
        ("rag-mm explore runs/quickstart", "rag-mm explore runs/quickstart --port=0"),
    ),
    "bench": Command(
        "measure beside a peer in the same process, or against a device's published peak",
        (
            "rag-mm bench memory --rows=300000 --json",
            "rag-mm bench train --against=transformers --json",
            "rag-mm bench train --against=unguarded --widths 192 768",
            "rag-mm bench train --against=peak --size=7b --remat=full",
            "rag-mm bench decode --against=transformers --json",
            "rag-mm bench decode --against=peak --size=7b",
        ),
    ),
    "generate": Command(
        "draw a picture from a caption, with the documents that were retrieved for it",
        (
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --out=apple.png',
            'rag-mm generate --workdir=runs/quickstart --prompt="red apple" --docs=0 --out=b.png',
        ),
    ),
    "caption": Command(
        "put a picture into words",
        ("rag-mm caption --workdir=runs/quickstart --image=apple.png",),
    ),
    "infill": Command(
        "redraw a band of a picture from what is around it",
        (
            'rag-mm infill --workdir=runs/quickstart --image=a.png --prompt="red apple" '
            "--rows=8:24 --out=b.png",
        ),
    ),
    "plan": Command(
        "compile a training or decoding step for TPUs that are not here: does it fit, what bounds it",
        (
            "rag-mm plan --config=configs/cm3leon.py:7b --topology=v5e:16x16",
            "rag-mm plan --config=configs/cm3leon.py:7b --topology=v5p:4x4x4 --search",
            "rag-mm plan --config=configs/cm3leon.py:760m --topology=v5e:2x4 --decode",
            "rag-mm plan --memory=1000000000x512 --topology=v5e:16x16",
        ),
    ),
    "import": Command(
        "make a run of a public CLIP, LLaMA or Chameleon checkpoint (safetensors)",
        (
            "rag-mm import clip clip-vit-base-patch32 --out=runs/clip",
            "rag-mm import llama TinyLlama-1.1B --out=runs/llama --dtype=float32",
            "rag-mm import chameleon chameleon-7b --out=runs/chameleon",
        ),
    ),
    "export": Command(
        "write a run's model as safetensors that from_pretrained loads",
        (
            "rag-mm export llama runs/llama out",
            "rag-mm export cm3 runs/quickstart out --dtype=bfloat16 --shard-size=2GB",
        ),
    ),
    "doctor": Command(
        "versions, devices, flags, disk: what this machine has and what does not fit",
        ("rag-mm doctor", "rag-mm doctor --json"),
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence; subparsers made from it are of its kind."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 when done, 1 when what was checked or computed is wrong, 2 for a user's mistake, 130 when
        interrupted.
    """
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except (Exception, KeyboardInterrupt) as error:
        code = explain(error)
        if code is None:
            raise
        return code


def explain(error: BaseException) -> int | None:
    """Says on stderr, in one sentence, what ended a command; the exit code, or None where it is a bug's."""
    match error:
        case UserError():
            said, code = f"{error}", 2
        case FloatingPointError():
            said, code = f"{error}; a smaller learning_rate may mend it.", 1
        case KeyboardInterrupt():
            said, code = "interrupted.", 130
        case BrokenPipeError():
            # The reader of stdout is gone; without this Python complains once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        case OSError(filename=filename, errno=number) if (
            filename is not None or number == errno.ENOSPC
        ):
            where = "" if filename is None else f"{os.fsdecode(filename)}: "
            said, code = f"{where}{error.strerror}.", 2
        case _:
            return None
    print(f"rag-mm: {said}", file=sys.stderr)
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
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command {name!r}; {hint}")
    choose_platform()
    module = load_command(name)
    args = _parse(name, module, argv[1:])
    with _stdout_for_result(args.json):
        result = module.run(args)
    if args.json:
        print(json.dumps(result, allow_nan=False), flush=True)
    else:
        import rich.console

        # Where nobody looks at a screen, lines are as long as they are.
        width = None if sys.stdout.isatty() else 200
        module.show(result, rich.console.Console(highlight=False, width=width))
    return 1 if result.get("ok") is False else 0


def load_command(name: str) -> types.ModuleType:
    """The module of a command; one that is a word of Python has an underscore behind it."""
    return importlib.import_module(f"rag_mm.cli.{name}{'_' * keyword.iskeyword(name)}")


def choose_platform() -> None:
    """Keeps jax on the CPU where no accelerator is plugged in, before jax looks and complains.

    libtpu, once installed, would search for a TPU for minutes; a JAX_PLATFORMS that is set wins.
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
            "commands (rag-mm COMMAND --help says more):",
            *lines,
            "",
            "examples:",
            *examples,
            "",
            "With --json a command prints one JSON object on stdout and nothing else there.",
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
        "--json", action="store_true", help="print one JSON object on stdout, nothing else"
    )
    module.add_arguments(parser)
    # Taken out first: behind a subcommand argparse would not know it.
    end = argv.index("--") if "--" in argv else len(argv)
    as_json = "--json" in argv[:end]
    rest = [word for i, word in enumerate(argv) if i >= end or word != "--json"]
    args, extra = parser.parse_known_args(rest)
    args.json = as_json
    args.overrides = {}
    for word in extra:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not hasattr(args, "config"):
            parser.error(f"unknown argument {word!r}")
        if not equals or not key:
            parser.error(f"{word} has no value; write --config.key=value")
        args.overrides[key] = value
    return args


@contextlib.contextmanager
def _stdout_for_result(is_json: bool) -> Iterator[None]:
    # Libraries below may print, in C too; until the result is there, all of it goes to stderr.
    if not is_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
