"""RA-CM3 at the paper's size (Yasunaga et al. 2023): planned, trained on corpora, or compiled small.

    rag-mm plan --config=configs/ra_cm3.py:2.7b --topology=v5p:4x4x4
    rag-mm train --config=configs/ra_cm3.py:2.7b --workdir=runs/ra_cm3 --config.world.corpus=CORPUS \\
        --config.retriever.folder=MEM/retriever --config.memory.folder=MEM

    preset  cost                                              what to expect
    tiny    a minute to compile                               a program of the same shape, for tests
    2.7b    30,000 steps of 3.4 s on 64 v5p chips, at best    not trained here; the paper's model

`plan` prints what one training step needs of each chip (docs/results/plans.md). The paper's batch of 16 per
GPU on 256 GPUs, four of them to a model replica, is read as 1,024 sequences. A run takes the image tokenizer
of its corpus; retriever and memory are given (docs/corpus.md).
"""

import dataclasses

from rag_mm.models import ra_cm3
from rag_mm.perf.plan import chain_sizes

PRESETS = ("tiny", "2.7b")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    is_tiny = preset == "tiny"
    optimizer = dict(
        learning_rate=1e-3 if is_tiny else 1e-4,
        warmup_steps=10 if is_tiny else 1500,
        b1=0.9,
        b2=0.98,
        clip_norm=1.0,
    )
    if not is_tiny:
        return chain_sizes.chain_page(
            "ra_cm3", ra_cm3.RACM3Config.b2_7(), optimizer, num_steps=30_000, batch_size=1024
        )
    return dict(
        family="ra_cm3",
        model=dataclasses.asdict(ra_cm3.RACM3Config.tiny()),
        optimizer=optimizer,
        num_steps=100,
        batch_size=256,
        accumulate=1,
    )
