"""The restart of dead codes as a part of the training step of a stage with a learned codebook."""

from functools import partial

from rag_mm.models.spae import code_restart
from rag_mm.train.step_end import StepEnd


def make_rule(
    config: code_restart.RestartConfig, codebook_size: int, num_steps: int
) -> StepEnd | None:
    """For `training.WhatTrains`; None where no code is to be moved in training of `num_steps`."""
    if not config.every:
        return None
    return StepEnd(
        partial(code_restart.init, codebook_size),
        partial(code_restart.update, config=config, num_steps=num_steps),
    )
