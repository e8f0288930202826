"""The README.md beside exported weights: a model card as the Hugging Face Hub reads it.

What a run holds may be a stranger's: words from it are escaped for YAML and Markdown, and no path is told.
"""

import dataclasses
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rag_mm.api import importing
from rag_mm.core import costs, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.report import figures, markdown, summary
from rag_mm.stages.ra_cm3 import decoder_record, write_report
from rag_mm.stages.shared import build_memory, frozen, world_config

FILE_NAME = "README.md"
UNKNOWN = "unknown"  # the Hub's word for a license that nobody stated
# Metrics of a run that are not those of its retriever.
_NOT_OF_ENCODERS = (
    "tokenizer", "decoder", "control", "baselines", "generation", "quickstart", "sft",
)  # fmt: skip
_MAX_ROWS = 60
_MAX_LICENSES = 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a model of a family is.

    Attributes:
        title: name of the kind of model.
        paper: title of its paper.
        arxiv: number of its paper.
        task: the Hub's pipeline tag.
        library: the library that loads the export.
        load: Python that loads it from FOLDER.
    """

    title: str
    paper: str
    arxiv: str
    task: str
    library: str
    load: str


_FROM_PRETRAINED = 'from transformers import {0}\n\nmodel = {0}.from_pretrained("FOLDER")'
_BY_NAME = """import glob

from safetensors.numpy import load_file

tensors = {}
for path in glob.glob("FOLDER/*.safetensors"):
    tensors |= load_file(path)  # names.json has the shape and the axes of each"""
_RA_CM3 = Kind(
    "RA-CM3", "Retrieval-Augmented Multimodal Language Modeling", "2211.12561", "any-to-any",
    "rag_mm", _BY_NAME,
)  # fmt: skip
KINDS = {
    "cm3": _RA_CM3,
    "clip": Kind(
        "CLIP", "Learning Transferable Visual Models From Natural Language Supervision", "2103.00020",
        "zero-shot-image-classification", "transformers", _FROM_PRETRAINED.format("CLIPModel"),
    ),
    "siglip2": Kind(
        "SigLIP 2", "SigLIP 2: Multilingual Vision-Language Encoders", "2502.14786",
        "zero-shot-image-classification", "transformers", _FROM_PRETRAINED.format("AutoModel"),
    ),
    "llama": Kind(
        "LLaMA", "LLaMA: Open and Efficient Foundation Language Models", "2302.13971",
        "text-generation", "transformers", _FROM_PRETRAINED.format("LlamaForCausalLM"),
    ),
    "chameleon": Kind(
        "Chameleon", "Chameleon: Mixed-Modal Early-Fusion Foundation Models", "2405.09818",
        "image-text-to-text", "transformers",
        _FROM_PRETRAINED.format("ChameleonForConditionalGeneration"),
    ),
    "emu": Kind(
        "Emu", "Generative Pretraining in Multimodality", "2307.05222", "any-to-any", "rag_mm",
        _BY_NAME.partition("  #")[0],
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weights:
    """The exported weights.

    Attributes:
        num_params: number of parameters.
        dtypes: names of their dtypes.
        config: of our model.
        stage: that trained them, if they are a trained run's decoder.
    """

    num_params: int
    dtypes: Sequence[str]
    config: Any
    stage: str = decoder_record.STAGE


def make(family: str, run: run_folder.Run, weights: Weights, license: str) -> str:
    """The text of a model card.

    Args:
        family: of the export: clip, siglip2, llama, chameleon, emu or cm3.
        run: the run that was exported.
        weights: what was exported.
        license: of the weights, an identifier of the Hub such as apache-2.0; `UNKNOWN` if nobody stated one.

    Raises:
        UserError: the run's config, metrics or memory are damaged.
    """
    try:
        return _text(family, run, weights, license)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The config or the metrics of {run.workdir} are damaged ({type(error).__name__}: {error}); "
            "export without --card."
        ) from error


def _text(family: str, run: run_folder.Run, weights: Weights, license: str) -> str:
    config, is_trained = run.config, importing.IMPORTED not in run.config
    kind = KINDS[family]
    if is_trained and family == "llama":
        kind = dataclasses.replace(_RA_CM3, library=kind.library, load=kind.load)
    licenses = _memory_licenses(run)
    parts = [
        _header(kind, license, licenses, is_trained),
        f"# {kind.title}, exported by rag_mm",
        f"{_first_sentence(config, family)} {_what_it_is(kind, family, is_trained)}",
        _section("Sizes", markdown.table(("", ""), _sizes(weights))),
        _section("Training", _training(run, family, weights.stage) if is_trained else _IMPORTED),
        _section("Metrics", _metrics(run, family, weights.stage)),
        _section("Licenses", _license_text(license, licenses, family)),
        _section("Use", f"```python\n{kind.load}\n```"),
        _section("Limits", _limits(family, is_trained)),
    ]
    return "\n\n".join(parts) + "\n"


_IMPORTED = (
    "The weights were imported from a public checkpoint and exported again; for their training data see that "
    "checkpoint's own card."
)


def _header(kind: Kind, license: str, licenses: Mapping[str | None, int], is_trained: bool) -> str:
    tags = [f"arxiv:{kind.arxiv}", "rag_mm"]
    if is_trained and kind.arxiv == _RA_CM3.arxiv:
        tags += ["retrieval-augmented-generation", "multimodal"]
    lines = [
        f"library_name: {kind.library}",
        f"pipeline_tag: {kind.task}",
        f"license: {markdown.yaml_string(license)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    if licenses:
        lines.append("memory_licenses:")
        for name, count in list(licenses.items())[:_MAX_LICENSES]:
            lines += [
                f"- license: {markdown.yaml_string(name or UNKNOWN)}",
                f"  documents: {count}",
            ]
    return "\n".join(["---", *lines, "---"])


def _first_sentence(config: Mapping[str, Any], family: str) -> str:
    """What the retriever has seen, on which every figure of held-out classes depends."""
    if importing.IMPORTED in config:
        return "What this model saw in training is not known here: it was imported."
    world = world_config.world_class(config["world"])
    if _is_given(config.get("retriever")):
        return "What the retriever saw in training is not known here: it was given, not trained."
    if world is world_config.EmojiWorld:
        return write_report.what_was_seen(write_report.retriever_splits(config))
    return (
        f"The retriever was trained on the source of the model's own documents "
        f"({world_config.NAMES[world]}); no class was held out from it."
    )


def _what_it_is(kind: Kind, family: str, is_trained: bool) -> str:
    encoder = dict.fromkeys(frozen.RETRIEVERS, "an image and text encoder")
    role = (encoder | {"llama": "a language model"}).get(
        family, "a language model of images and text"
    )
    if is_trained and family not in frozen.RETRIEVERS:
        role = (
            "a decoder that writes captions, draws images and fills in what was masked, with retrieved "
            "documents in its context"
        )
    shape = " Its architecture is LLaMA's." if is_trained and family == "llama" else ""
    return (
        f"This is {role}, after *{kind.paper}* (https://arxiv.org/abs/{kind.arxiv}).{shape} "
        "It was written by `rag-mm export`."
    )


def _sizes(weights: Weights) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{weights.num_params:,}"
    yield "dtype", ", ".join(weights.dtypes)
    for path, value in _numbers(weights.config):
        yield path, f"{value:,}"


_SHOWN = (
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "max_seq_len",
    "max_text_len", "image_size", "patch_size", "projection_dim", "codebook_size",
)  # fmt: skip


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The sizes in a config and in the configs inside it, with their paths."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{field.name}.")
        elif field.name in _SHOWN and type(value) is int:
            yield f"{prefix}{field.name}", value


def _training(run: run_folder.Run, family: str, stage: str) -> str:
    config = run.config
    facts = [("config page", _page(run)), ("seed", str(config.get("seed", UNKNOWN)))]
    world_class = world_config.world_class(config["world"])
    world = world_config.NAMES[world_class]
    # In a world that is a corpus nothing but the decoder is trained.
    given = ("tokenizer",) if world_class is world_config.CorpusWorld else ()
    stages = (
        ("retriever",) if family in frozen.RETRIEVERS else ("tokenizer", "retriever", "decoder")
    )
    rows = []
    for name in dict.fromkeys((*stages, stage) if family not in frozen.RETRIEVERS else stages):
        values, spent = config.get(name), costs.summary(run.stage_dir(name))
        if not isinstance(values, dict) or not spent["parts"]:
            continue
        steps = values.get("loop", {}).get("num_steps", UNKNOWN)
        batch, code = values.get("batch_size", UNKNOWN), spent["code"] or UNKNOWN
        if _is_given(values) or name in given:
            steps, batch = "none: it was given", "none"
        rows.append(
            (name, str(steps), str(batch), str(code), figures.duration(spent["wall_seconds"]))
        )
    head = ("stage", "steps", "batch", "version and commit of rag_mm", "time")
    return (
        f"Trained on {world}.\n\n{markdown.table(('', ''), facts)}\n\n{markdown.table(head, rows)}"
    )


def _is_given(stage: Any) -> bool:
    """Whether a stage took its model from a folder, by its values in a run's config."""
    return isinstance(stage, dict) and stage.get("folder") is not None


def _page(run: run_folder.Run) -> str:
    """The page's name without its folders, which say where somebody's files lie."""
    path = run.workdir / run_folder.PAGE
    try:
        return posixpath.basename(files.read_object(path, page=str)["page"]) or UNKNOWN
    except (UserError, OSError):
        return UNKNOWN


def _metrics(run: run_folder.Run, family: str, stage: str) -> str:
    """The headline metrics with their controls and the paired differences; of others, every figure.

    Of a decoder of another stage than the first, the figures of that stage alone.
    """
    others = {run_folder.MACHINE, *(_NOT_OF_ENCODERS if family in frozen.RETRIEVERS else ())}
    if importing.IMPORTED in run.config:
        others.add(importing.STAGES[family])  # the sizes of its files
    metrics = {key: value for key, value in run.metrics.items() if key not in others}
    if stage != decoder_record.STAGE:
        metrics = {key: value for key, value in metrics.items() if key == stage}
    lead = "± is the half width of a 95 % interval."
    if "joint_accuracy" in metrics.get("decoder", {}):
        rows = [row for row in summary.summary_table(metrics) if row[1] != figures.MISSING]
        text = f"{lead}\n\n{markdown.table(('metric', 'value', 'meaning'), rows)}"
        paired = metrics["decoder"].get("paired")
        if isinstance(paired, dict) and paired:
            differences = figures.flatten(paired)
            text += (
                "\n\nDifferences to the controls, document by document:\n\n"
                f"{markdown.table(('difference', 'value'), differences)}"
            )
        return text
    every = figures.flatten(metrics)
    if not every:
        return "None were measured."
    cut = "" if len(every) <= _MAX_ROWS else f" The first {_MAX_ROWS} of {len(every)}."
    return f"{lead}{cut}\n\n{markdown.table(('metric', 'value'), every[:_MAX_ROWS])}"


def _memory_licenses(run: run_folder.Run) -> dict[str | None, int]:
    """Documents of the run's memory by license; empty without a memory."""
    manifest = run.manifest("memory")
    is_done = manifest is not None and manifest.is_done
    return build_memory.open_memory(run).licenses() if is_done else {}


def _license_text(license: str, licenses: Mapping[str | None, int], family: str) -> str:
    stated = (
        f"The license of the weights is {markdown.plain(license)}."
        if license != UNKNOWN
        else "Nobody has stated a license of the weights; ask whoever trained them."
    )
    if not licenses:
        return f"{stated} The run has no memory of documents."
    rows = [(name or "none stated", f"{count:,}") for name, count in licenses.items()]
    more = len(rows) - _MAX_LICENSES
    cut = f"\n\nand {more} further licenses." if more > 0 else ""
    role = "which it embeds" if family in frozen.RETRIEVERS else "which it reads and copies from"
    table = markdown.table(("license", "documents"), rows[:_MAX_LICENSES])
    return (
        f"{stated} The documents of the run's memory, {role}, name the licenses below; they are not part of "
        f"the export.\n\n{table}{cut}"
    )


def _limits(family: str, is_trained: bool) -> str:
    lines = [
        "- The metrics hold for the documents on which the run measured them, and for no others."
    ]
    if is_trained and family not in frozen.RETRIEVERS:
        lines += [
            "- The image tokenizer, the retriever and the memory stay in the run; the model reads and writes "
            "token ids.",
            "- It copies what it retrieves: whoever can write into the memory decides what it shows.",
        ]
    if family == "cm3":
        lines.append("- The tensors have rag_mm's own names; `from_pretrained` does not load them.")
    lines.append("- It was not examined for harmful or biased output.")
    return "\n".join(lines)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"
