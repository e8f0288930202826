"""CM3Leon at the paper's sizes (Yu et al. 2023, Table 3): planned for a pod, compiled small, or a chain.

    rag-mm plan --config=configs/cm3leon.py:7b --topology=v5e:16x16
    rag-mm train --config=configs/cm3leon.py:chain --workdir=runs/cm3leon

    preset  cost, at best, on 256 v5e chips    what to expect
    tiny    a minute to compile                a program of the same shape, for tests
    350m    175,000 steps of 0.5 s             not trained here; the paper's model
    760m    238,000 steps of 1.2 s             not trained here; the paper's model
    7b      300,000 steps of 7.3 s             not trained here; the paper's model
    chain   a minute on two cores              trained: the stages of RA-CM3's quickstart with CM3Leon's
                                               decoder and loss; runs every stage, learns nothing

`plan` prints what one training step of 8M tokens needs of each chip (docs/results/plans.md). Learning rate,
warm-up and batch are the paper's; betas, clipping, weight decay and the linear schedule, which ends at a
tenth of the peak, are OPT's, on whose code the paper builds. Left different: the paper restarted 760m and 7b
with a higher rate after one epoch (CM3Leon, figure 3), here one schedule covers all steps. Override single
values with `--config.model.decoder.dtype=float32` and the like.
"""

import dataclasses

from rag_mm.configs import quickstart

from rag_mm.core import configuration
from rag_mm.models import cm3leon
from rag_mm.nn.decoder import DecoderConfig

PRESETS = ("tiny", "350m", "760m", "7b", "chain")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    return chain() if preset == "chain" else _sizes(preset)


def chain() -> dict:
    """A minute for every stage of a chain, and nothing learned."""
    config, model = quickstart.tiny(), cm3leon.CM3LeonConfig.tiny()
    values = dataclasses.asdict(model.decoder)
    del values["vocab_size"], values["max_seq_len"]  # They follow from the data.
    shape = configuration.without_defaults(configuration.Section(DecoderConfig), values)
    decoder = {name: value for name, value in config["decoder"].items() if name != "look_back"}
    return config | dict(
        decoder=decoder
        | dict(
            model=shape,
            alpha=model.alpha,
            sentinel_weight=model.sentinel_weight,
            normalize_by=model.normalize_by,
            optimizer=_optimizer(1e-3, 10),
        ),
    )


def _sizes(preset: str) -> dict:
    model, learning_rate, num_steps = {
        "tiny": (cm3leon.CM3LeonConfig.tiny(), 1e-3, 100),
        "350m": (cm3leon.CM3LeonConfig.m350(), 6e-4, 175_000),
        "760m": (cm3leon.CM3LeonConfig.m760(), 5e-4, 238_000),
        "7b": (cm3leon.CM3LeonConfig.b7(), 1.2e-4, 300_000),
    }[preset]
    is_tiny = preset == "tiny"
    return dict(
        family="cm3leon",
        model=dataclasses.asdict(model),
        optimizer=_optimizer(learning_rate, 10 if is_tiny else 1500),
        num_steps=num_steps,
        batch_size=256 if is_tiny else 2048,  # sequences of max_seq_len tokens: 8M tokens
        accumulate=1,
    )


def _optimizer(learning_rate: float, warmup_steps: int) -> dict:
    return dict(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        end_rate=0.1,
    )
