"""`rag-mm eval`: a published evaluation protocol on a run and your own images."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rich.console

from rag_mm.cli import lm_args
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.data import labeled

_SCENES = "scenes:"
# The suites that read --documents.
_INSTRUCTIONS = ("vqa", "caption", "edit", "boxes", "structure")
_NAMED = "vqa, caption, edit, boxes and structure"
# What they read: any run, and one of Emu alone.
_ASKED = ("stage", "docs", "limit", "temperature", "seed")
_IN_CONTEXT = ("shots", "examples", "select", "max_examples", "prompts")
REFINE = ("none", "image", "text", "both")
# The options that each suite reads, besides --workdir and the images.
SUITES: dict[str, tuple[str, ...]] = {
    "zeroshot": ("refine", "memory", "k", "template"),
    "fewshot": (
        *(
            "ways",
            "shots",
            "queries",
            "episodes",
            "seed",
            "control",
            "levels",
            "top",
            "against",
            "lm",
        ),
        *("repeats", "induction", "labels", "bags", "scoring"),
        *lm_args.LIMITS,
    ),
    **dict.fromkeys(_INSTRUCTIONS, _ASKED),
    **dict.fromkeys(("vqa", "caption"), (*_ASKED, *_IN_CONTEXT)),
    "visdial": ("stage", "docs", "limit"),
    "text2image": (*_ASKED, "best_of", "inception"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm eval`."""
    parser.add_argument("--suite", required=True, choices=list(SUITES), help="evaluation protocol")
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="RUN",
        help="finished run: of configs/reco.py for zeroshot (any retriever with --refine=none), of "
        "configs/spae.py for fewshot, with a decoder, "
        f"best tuned by configs/cm3leon.py:sft, for {_NAMED}",
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--images",
        metavar="DIR",
        help="labeled images as DIR/CLASS/IMAGE.jpg, or scenes:LEVEL/SPLIT[+SPLIT]/ROLE[/SEED]",
    )
    images.add_argument(
        "--dataset",
        metavar="NAME[:SPLIT]",
        help="labeled TFDS dataset in ArrayRecord form, such as caltech_birds2011 (default split: test)",
    )
    images.add_argument(
        "--documents",
        metavar="LAYOUT:PATH",
        help="vqav2:DIR for vqa, coco-captions:DIR for caption, instruct-pix2pix:DIR for edit, "
        "coco-boxes:DIR for boxes, controlnet:DIR for structure, visdial:DIR for visdial; for caption and "
        "text2image also what memory build reads, such as a folder with captions.jsonl; or "
        "scenes:LEVEL/SPLIT[+SPLIT]/ROLE[/SEED]",
    )
    _add_zeroshot(parser.add_argument_group("zeroshot"))
    _add_instructions(parser.add_argument_group(_NAMED))
    _add_in_context(parser.add_argument_group("vqa and caption, on a run of Emu"))
    _add_fewshot(parser.add_argument_group("fewshot"))
    lm_args.add_limits(parser)


def _add_zeroshot(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--refine", choices=REFINE, help="which embeddings retrieval refines (default: both)"
    )
    group.add_argument("--memory", metavar="MEM", help="memory to use instead of the run's own")
    group.add_argument(
        "-k", type=int, dest="k", help="number of neighbors (default: as in training)"
    )
    group.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt template with {} for the class; repeat it to average several templates",
    )


def _add_instructions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--stage",
        help="stage whose decoder is asked (default: sft if it is finished, else decoder)",
    )
    group.add_argument(
        "--docs",
        type=int,
        help="documents retrieved by the image that is asked about, or by the text of one to be drawn "
        "(default: 1; edits read none)",
    )
    group.add_argument("--limit", type=int, help="only so many items (default: all)")
    group.add_argument(
        "--temperature",
        type=float,
        help="of sampled images; texts are the likeliest (default: 0.4; of text2image 1)",
    )
    group.add_argument(
        "--best-of",
        type=int,
        help="text2image: pictures drawn for each caption, ranked by the retriever (default: 8)",
    )
    group.add_argument(
        "--inception",
        metavar="FILE",
        help="text2image: safetensors file of the Inception of pytorch-fid, which adds fid",
    )


def _add_in_context(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--examples",
        metavar="LAYOUT:PATH",
        help="where --shots examples in context are taken from, such as the training split",
    )
    group.add_argument(
        "--select",
        choices=("rices", "random"),
        help="the examples with the nearest pictures, or random ones (default: rices)",
    )
    group.add_argument(
        "--max-examples", type=int, help="the examples chosen from, the first ones (default: 10000)"
    )
    group.add_argument(
        "--prompts",
        choices=("plain", "paper"),
        help="ask by the question alone, or in the wordings of Emu's evaluation (default: plain)",
    )


def _add_fewshot(group: argparse._ArgumentGroup) -> None:
    counts = {
        "ways": "classes per episode (default: 5)",
        "shots": "examples per class (default: 1); of vqa and caption the examples in context (default: 0)",
        "queries": "images to classify per class (default: 1)",
        "episodes": "number of episodes (default: 100)",
        "seed": "of the choice of images; the same seed gives the same episodes (default: 0)",
        "levels": "the words of the first few levels stand for an image (default: 2)",
        "top": "instead, so many words of the best relative score",
        "repeats": "how many more times all examples are shown (default: 0)",
        "bags": "random bags of words by which scores are calibrated (default: 8)",
    }
    for name, text in counts.items():
        group.add_argument(f"--{name}", type=int, help=text)
    group.add_argument(
        "--control",
        choices=("none", "deranged", "foreign"),
        help="spoil the examples: deranged labels, or examples of foreign classes (default: none)",
    )
    group.add_argument(
        "--against",
        metavar="RUN",
        help="also classify by this run's words in the same episodes, and report the paired difference",
    )
    lm_args.add_lm(group, "equal words are counted")
    group.add_argument(
        "--induction",
        action="store_true",
        default=None,
        help="begin the prompt by naming the labels (the paper's task induction)",
    )
    group.add_argument(
        "--labels",
        choices=("names", "nouns", "nonsense"),
        help="answers: names of classes, or words drawn for each episode (default: names)",
    )
    group.add_argument(
        "--scoring",
        choices=("calibrated", "greedy", "both"),
        help="compare log-probabilities of the labels, or read what the model writes (default: calibrated)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates. Returns `accuracy`, `ci95`, `n` and more; see `zeroshot_suite` and `few_shot_suite`."""
    from rag_mm.data import labeled
    from rag_mm.worlds.emoji import labeled_scenes

    for suite, names in SUITES.items():
        for name in names:
            if name not in SUITES[args.suite] and getattr(args, name) is not None:
                option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is an option of --suite={suite}, not of {args.suite}.")
    if args.k is not None and args.k < 1:
        raise UserError(f"-k is {args.k}; give at least 1.")
    reads_documents = args.suite in (*_INSTRUCTIONS, "visdial", "text2image")
    if reads_documents != (args.documents is not None):
        wanted = "--documents" if reads_documents else "--images or --dataset"
        raise UserError(f"The suite {args.suite} reads {wanted}; give that.")
    if args.documents is not None:
        ask = _text2image if args.suite == "text2image" else _instructions
        return {"suite": args.suite, **ask(args)}
    configs = _fewshot_configs(args) if args.suite == "fewshot" else {}
    images: labeled.Labeled
    if args.images is None:
        images = labeled.open_dataset(args.dataset)
    elif args.images.startswith(_SCENES):
        images = labeled_scenes.LabeledScenes(args.images.removeprefix(_SCENES))
    else:
        images = labeled.LabeledFolder(pathlib.Path(args.images))
    result = _fewshot(args, images, configs) if configs else _zeroshot(args, images)
    return {"suite": args.suite, **result}


# Imported only in the functions, so that missing images are reported before jax starts.
def _zeroshot(args: argparse.Namespace, images: "labeled.Labeled") -> dict[str, Any]:
    from rag_mm.stages.reco import zeroshot_suite

    return zeroshot_suite.evaluate(
        args.workdir,
        images,
        refine=args.refine or "both",
        memory=args.memory,
        num_neighbors=args.k,
        templates=args.template,
    )


def _instructions(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.api import emu_session, imported
    from rag_mm.stages.cm3leon import instruction_suites

    options = {name: getattr(args, name) for name in SUITES[args.suite]}
    given = {name: value for name, value in options.items() if value is not None}
    if emu_session.is_emu(args.workdir) or imported.is_imported(args.workdir, "emu"):
        return _emu(args, given)
    emus = [name for name in given if name in _IN_CONTEXT]
    if args.suite == "visdial" or emus:
        what = f"--{emus[0].replace('_', '-')}" if emus else f"The suite {args.suite}"
        raise UserError(f"{what} is for runs of Emu, which {args.workdir} is not.")
    config = instruction_suites.SuiteConfig(**given)
    return instruction_suites.evaluate(args.workdir, args.suite, args.documents, config)


def _text2image(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.stages.cm3leon import text2image_suite

    options = {name: getattr(args, name) for name in SUITES[args.suite]}
    given = {name: value for name, value in options.items() if value is not None}
    config = text2image_suite.Text2ImageConfig(**given)
    return text2image_suite.evaluate(args.workdir, args.documents, config)


def _emu(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    from rag_mm.api import emu_suites

    if "temperature" in given:
        raise UserError("--temperature is not read on a run of Emu, which searches; leave it out.")
    config = emu_suites.EmuSuiteConfig(**given)
    return emu_suites.evaluate(args.workdir, args.suite, args.documents, config)


def _fewshot_configs(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.eval import few_shot_episodes

    def given(fields: Sequence[str], **renamed: str) -> dict[str, Any]:
        """Field -> value of the options that were given."""
        values = {field: getattr(args, renamed.get(field, field)) for field in (*fields, *renamed)}
        return {field: value for field, value in values.items() if value is not None}

    drawn = given(("ways", "shots", "queries", "seed", "control"), num_episodes="episodes")
    asked = given(("repeats", "induction", "labels", "scoring"), num_bags="bags")
    if args.lm is None and asked:
        name = next(iter(asked)).removeprefix("num_")
        raise UserError(f"--{name} is about asking a language model; name one with --lm.")
    return {
        "episodes": few_shot_episodes.EpisodeConfig(**drawn),
        "ask": few_shot_episodes.AskConfig(**asked),
    }


def _fewshot(
    args: argparse.Namespace, images: "labeled.Labeled", configs: dict[str, Any]
) -> dict[str, Any]:
    limits = lm_args.read_limits(args)
    from rag_mm.stages.spae import few_shot_suite

    words = few_shot_suite.WordsConfig(args.levels, args.top)
    lm = lm_args.open_lm(args, limits)
    return few_shot_suite.evaluate(
        args.workdir, images, lm=lm, words=words, against=args.against, **configs
    )


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the accuracies, and the page's path of `zeroshot`."""
    describe = {
        "fewshot": _fewshot_lines,
        "zeroshot": _zeroshot_lines,
        "text2image": _text2image_lines,
    }
    lines = describe.get(result["suite"], _instruction_lines)(result)
    lines += [f"skipped {name}: {reason}" for name, reason in result["rejected"][:5]]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _zeroshot_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"accuracy {result['accuracy']:.1%} ± {result['ci95']:.1%} of {result['n']} images, "
        f"{result['classes']} classes, refine={result['refine']}"
    ]
    if "page" not in result:  # Of a retriever alone.
        return lines
    return [
        *lines,
        f"frozen   {result['frozen']:.1%}, gain {100 * result['gain']:+.1f} points",
        f"page     {result['page']}",
    ]


def _text2image_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in (("single", result["single"]), (f"best of {result['best_of']}", result)):
        score, fid = found["clip_score"], f"fid {found['fid']:.2f}, " if "fid" in found else ""
        lines.append(
            f"{name:<12} {fid}frechet_own {found['frechet_own']:.4f}, kid {found['kid']:.2f}, clip_score "
            f"{score['mean']:.2f} ± {score['ci95']:.2f}"
        )
    return [
        *lines,
        f"decoder of the stage {result['stage']}, {result['docs']} retrieved documents, {result['n']} "
        "captions; all by the run's own retriever",
    ]


def _instruction_lines(result: dict[str, Any]) -> list[str]:
    figures = {"accuracy": result} if "accuracy" in result else {}
    figures |= {
        key: value for key, value in result.items() if isinstance(value, dict) and "n" in value
    }
    lines = [
        f"{name:<12} {found.get('accuracy', found.get('mean')):.3f} ± {found['ci95']:.3f} of {found['n']}"
        for name, found in figures.items()
    ]
    for key, values in result.items():
        if key.startswith("by_"):
            lines += [f"  {kind:<16} {value:.3f}" for kind, value in sorted(values.items())]
    lines.append(f"decoder of the stage {result['stage']}, {result['docs']} retrieved documents")
    if result["rejected"]:
        lines.append(f"{len(result['rejected'])} bad records were left out")
    return lines


def _fewshot_lines(result: dict[str, Any]) -> list[str]:
    names = {
        "greedy": "LM, greedy",
        "log_p": "LM, log-probability",
        "calibrated": "LM, calibrated",
        "overlap": "word overlap, no LM",
    }
    lines = [
        f"{name:<20} {result[key]['accuracy']:.1%} ± {result[key]['ci95']:.1%} "
        f"(s.e. {result[key]['standard_error']:.1%})"
        for key, name in names.items()
        if key in result
    ]
    lines.append(f"{'chance':<20} {result['chance']:.1%}")
    lines += lm_args.one_token_line(result.get("one_token_words"))
    for key, paired in result.get("over_against", {}).items():
        lines.append(
            f"{names[key]:<20} {100 * paired['mean']:+.1f} ± {100 * paired['ci95']:.1f} points over the "
            f"other run (s.e. {100 * paired['standard_error']:.1f})"
        )
    lines.append(
        f"{result['n']} episodes of {result['classes']} classes, {result['words']} words per image"
    )
    return lines
