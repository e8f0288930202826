"""RA-CM3 at the paper's size (Yasunaga et al. 2023): planned for a pod, or compiled small.

    rag-mm plan --config=configs/ra_cm3.py:2.7b --topology=v5p:4x4x4

    preset  cost                                              what to expect
    tiny    a minute to compile                               a program of the same shape, for tests
    2.7b    30,000 steps of 3.4 s on 64 v5p chips, at best    not trained here; the paper's model

`plan` prints what one training step needs of each chip (docs/results/plans.md). The paper's batch of 16 per
GPU on 256 GPUs, four of them to a model replica, is read as 1,024 sequences.
"""

import dataclasses

from rag_mm.models import ra_cm3

PRESETS = ("tiny", "2.7b")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    is_tiny = preset == "tiny"
    model = ra_cm3.RACM3Config.tiny() if is_tiny else ra_cm3.RACM3Config.b2_7()
    return dict(
        family="ra_cm3",
        model=dataclasses.asdict(model),
        optimizer=dict(
            learning_rate=1e-3 if is_tiny else 1e-4,
            warmup_steps=10 if is_tiny else 1500,
            b1=0.9,
            b2=0.98,
            clip_norm=1.0,
        ),
        num_steps=100 if is_tiny else 30_000,
        batch_size=256 if is_tiny else 1024,
        accumulate=1,
    )
