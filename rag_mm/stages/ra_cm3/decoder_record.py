"""The file decoder.json beside a trained decoder's parameters: its shape, the layout and what it has seen.

It lets a decoder be loaded, or trained further, without the config of its stage. It rejects codes of another
image tokenizer, and prompts are laid out as in training.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath
from flax import nnx

from rag_mm.core import files, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data.sequences import Layout
from rag_mm.models import ra_cm3
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.ra_cm3 import null_prompts
from rag_mm.stages.shared import frozen

FILE = "decoder.json"
STAGE = "decoder"  # Its name, unless another stage of a run is asked for.
# What positions and marks of sequences mean; a decoder of another version reads them otherwise.
SEQUENCES_VERSION = 2


class DecoderRecord(NamedTuple):
    """A decoder's config with its loss, the layout of its sequences, and the null prompts that it knows."""

    model: ra_cm3.RACM3Config
    layout: Layout
    null_prompts: list[str]


def write(
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    layout: Layout,
    model: ra_cm3.RACM3Config,
    shown: Iterable[str],
) -> None:
    """Writes decoder.json; `shown` are null prompts (`decode.guidance`) that training showed."""
    record = {
        "sequences": SEQUENCES_VERSION,
        "tokenizer": image_tokenizer.fingerprint,
        "layout": dataclasses.asdict(layout),
        "null_prompts": list(shown),
        "model": dataclasses.asdict(model),
    }
    files.write_json(stage_dir / FILE, record)


def find_folder(run: run_folder.Run, stage: str = STAGE) -> epath.Path:
    """Folder of a finished stage that trained a decoder.

    Raises:
        UserError: the stage is missing, unfinished or edited, or trained no decoder.
    """
    try:
        run.stage_dir(stage)
    except ValueError:
        raise UserError(
            f"{stage!r} is no name of a stage; give one that trains a decoder, such as {STAGE} or sft."
        ) from None
    stage_dir = run.finished_stage(stage)
    if not (stage_dir / FILE).exists():
        raise UserError(
            f"The stage {stage!r} of {run.workdir} has no decoder; give one that trains one, such as {STAGE} "
            "or sft."
        )
    return stage_dir


def read(stage_dir: epath.Path, image_tokenizer: frozen.FrozenTokenizer) -> DecoderRecord:
    """Reads decoder.json.

    Raises:
        UserError: it is missing or of another version, or the decoder was trained on another tokenizer's
        codes.
    """
    record = files.read_object(stage_dir / FILE, tokenizer=str, model=dict, layout=dict)
    if record["tokenizer"] != image_tokenizer.fingerprint:
        raise UserError(
            f"{stage_dir} was trained on codes of tokenizer {record['tokenizer'][:12]}, not of "
            f"{image_tokenizer.fingerprint[:12]}; use the tokenizer that it was trained with."
        )
    if record.get("sequences") != SEQUENCES_VERSION:
        raise UserError(
            f"{stage_dir} was trained by another version, whose sequences had other positions; train it "
            "again."
        )
    model = renames.from_stored(record["model"])
    try:
        config = ra_cm3.RACM3Config(DecoderConfig(**model.pop("decoder")), **model)
        shape = config.decoder
        if shape.vocab_size < image_tokenizer.vocabulary.size or shape.context_dim is not None:
            raise ValueError("its decoder does not read the tokenizer's vocabulary alone")
        layout = Layout(**renames.from_stored(record["layout"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{stage_dir} contains a model of another version ({error}); train it again."
        ) from None
    return DecoderRecord(config, layout, null_prompts.load(stage_dir, record))


def make_model(config: ra_cm3.RACM3Config, seed: int) -> ra_cm3.Model:
    """A decoder with new parameters."""
    return ra_cm3.Model(config.decoder, rngs=nnx.Rngs(params=seed))
