"""Table of RA-CM3's stages, and the settings on which they must agree."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_mm.core.errors import UserError
from rag_mm.stages.ra_cm3 import (
    copy_probe,
    decoder_training,
    evaluate,
    few_shot,
    generate_samples,
    pretrain,
    train_decoder,
    write_report,
)
from rag_mm.stages.shared import starting_point
from rag_mm.stages.stage import SCENES, WITH_CORPORA, Stage


@dataclasses.dataclass(frozen=True)
class ControlSection:
    """The baseline without retrieval; all other settings are those of the decoder.

    Attributes:
        num_steps: number of training steps; None for the decoder's.
        model: settings that differ from the decoder's `model`, such as {"smear_lags": ()}; None for none.
        optimizer: settings that differ from the decoder's `optimizer`; None for none.
    """

    num_steps: int | None = None
    model: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] | None = None


def resolve_control(page: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the baseline's config, derived from the decoder's on the page."""
    values = {**page.get("decoder", {}), "is_baseline": True}
    for part in ("model", "optimizer"):
        values[part] = {**values.get(part, {}), **(section.get(part) or {})}
    if "smear_lags" in (section.get("model") or {}):
        values.pop("look_back", None)
    # Trained whole and from the start: what the decoder starts from may have read documents.
    own = {field.name for field in dataclasses.fields(starting_point.StartConfig)}
    values = {key: value for key, value in values.items() if key not in own}
    if section.get("num_steps") is not None:
        values["loop"] = {**values["loop"], "num_steps": section["num_steps"]}
    return values


def start_inputs(config: decoder_training.DecoderTrainingConfig) -> tuple[str, ...]:
    """The stage of the run that a decoder's training starts from, if there is one."""
    return () if config.start_stage is None else (config.start_stage,)


STAGES = {
    "decoder": Stage(
        train_decoder.DecoderStageConfig,
        train_decoder.INPUTS,
        train_decoder.run,
        mesh=decoder_training.make_mesh,
        more_inputs=start_inputs,
    ),
    "control": Stage(
        train_decoder.DecoderStageConfig,
        train_decoder.CONTROL_INPUTS,
        train_decoder.run,
        mesh=decoder_training.make_mesh,
        section=ControlSection,
        resolve=resolve_control,
    ),
    "pretraining": Stage(
        pretrain.PretrainingStageConfig,
        pretrain.INPUTS,
        pretrain.run,
        WITH_CORPORA,
        mesh=decoder_training.make_mesh,
        more_inputs=start_inputs,
    ),
    "copy_probe": Stage(
        copy_probe.CopyProbeStageConfig,
        copy_probe.INPUTS,
        copy_probe.run,
        SCENES,
        mesh=decoder_training.make_mesh,
        more_inputs=start_inputs,
    ),
    "few_shot": Stage(few_shot.FewShotStageConfig, few_shot.INPUTS, few_shot.run, SCENES),
    "generation": Stage(
        generate_samples.GenerationStageConfig,
        generate_samples.INPUTS,
        generate_samples.run,
        SCENES,
        needs_own_memory=True,
    ),
    "evaluation": Stage(
        evaluate.EvaluationStageConfig,
        evaluate.INPUTS,
        evaluate.run,
        SCENES,
        needs_own_memory=True,
        holds=("generation",),
        reports_on_others=True,
    ),
    "report": Stage(
        write_report.ReportStageConfig,
        write_report.INPUTS,
        write_report.run,
        SCENES,
        holds=("generation",),
        finish=write_report.finish,
        page=write_report.PAGE,
    ),
}


def check_agreement(configs: Mapping[str, Any]) -> None:
    """Checks that `decoder` and `generation` read no more than `neighbors` writes.

    Raises:
        UserError: they read more documents or test documents, or another number of captions.
    """
    neighbors = configs.get("neighbors")
    for stage, path, name in (
        ("decoder", "sequences.captions_per_image", "captions_per_image"),
        ("decoder", "sequences.max_docs", "num_neighbors"),
        ("generation", "num_held_out", "num_test"),
        ("generation", "num_seen", "num_test"),
    ):
        if neighbors is None or stage not in configs:
            continue
        required, available = configs[stage], getattr(neighbors, name)
        for part in path.split("."):
            required = getattr(required, part)
        must_equal = name == "captions_per_image"
        if required > available or (must_equal and required != available):
            raise UserError(
                f"{stage}.{path} is {required}, but neighbors.{name} is {available}; make them agree."
            )
