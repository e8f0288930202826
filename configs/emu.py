"""Emu: one decoder over texts and the vectors of images (Sun et al. 2023, arXiv 2307.05222).

    rag-mm train --config=configs/emu.py:quick --workdir=runs/emu --reuse=runs/quickstart
    rag-mm ablate --config=configs/emu.py:quick --workdir=runs/emu3 --reuse RUN RUN RUN
    rag-mm plan --config=configs/emu.py:14b --topology=v5p:4x4x4

    preset  cost on two cores  what it is
    quick   12 minutes         emoji scenes: captions, images' vectors from captions, stories and clips, with
                               and without retrieved documents; the tower is the quickstart's retriever
    seen    12 minutes         the same with a tower that has not seen the held-out classes
    own     by dataset         no figures are claimed; your images and captions, and by emu_data.documents web
                               pages, storyboards and other documents
    own_tiny  a minute         the same, learns nothing
    tiny    a minute           runs every stage, learns nothing; for tests
    7b      a pod              the paper's ablation on LLaMA 7B; planned, not trained here
    14b     a pod              the paper's model; planned, not trained here

Figures are in docs/results/emu.md. The last two have the published optimizer and three learning rates; how
many rows a step had is unknown, and 1,024 rows of 1,024 tokens and 5 images are our choice.
"""

import dataclasses

from rag_mm.configs import own_images, quickstart

from rag_mm.models.emu.emu_config import EmuConfig

PRESETS = ("quick", "seen", "own", "own_tiny", "tiny", "7b", "14b")
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "emu_data", "emu", "emu_figures")
SPLITS = ("held_out", "seen")
FIGURES = (
    *(
        f"{split}.{documents}.{figure}"
        for split in SPLITS
        for figure in ("r2", "random", "own", "same", "exact", "place", "color", "caption_nll")
        for documents in ("none", "oracle", "retrieved", "wrong")
    ),
    *(f"{split}.shuffled.random" for split in SPLITS),
    *(f"{split}.encoded.read_{fact}" for split in SPLITS for fact in ("entity", "place", "color")),
    "held_out_stories.story.story_nll",
    "held_out_clips.in_order.direction",
    "held_out_clips.shuffled_frames.direction",
)
COMPARED = tuple(
    (f"{split}.{ours}.{figure}", f"{split}.{theirs}.{figure}")
    for split, figure, ours, theirs in (
        ("held_out", "r2", "oracle", "none"),
        ("held_out", "same", "oracle", "none"),
        ("held_out", "same", "oracle", "wrong"),
        ("held_out", "same", "retrieved", "none"),
        ("seen", "exact", "oracle", "none"),
        ("held_out_clips", "direction", "in_order", "shuffled_frames"),
    )
)
_PLAIN = {"emu.targets.kind": "cformer"}
_NO_ANCHOR = {"emu.targets.anchor_weight": 0.0}
_NO_TABLE = {"emu.targets.has_positions": False}
# Each option of the miniature alone is changed, except in the paper's own setting.
VARIANTS = {
    "as it is": {},
    "plain targets": _PLAIN,
    "no anchor": _NO_ANCHOR,
    "no position table": _NO_TABLE,
    "tokens as they come": {"emu.targets.standardises_tokens": False},
    "the paper's targets": {
        **_PLAIN,
        **_NO_ANCHOR,
        **_NO_TABLE,
        "emu.targets.standardises_tokens": False,
        "emu.cformer.query_std": 0.02,
    },
    "one learning rate": {"emu.optimizer.groups": ()},
    "principal components": {
        "emu.targets.kind": "pca",
        **_NO_ANCHOR,
        **_NO_TABLE,
        "emu.optimizer.groups": (),
    },
    "slot for the class token": {"emu.targets.has_class_slot": True},
    "bidirectional queries": {"emu.cformer.is_causal": False},
    "2 queries": {"emu.cformer.num_queries": 2},
    "8 queries": {"emu.cformer.num_queries": 8, "emu.sequences.max_seq_len": 192},
    "text loss alone": {"emu.image_loss_weight": 0.0, **_NO_ANCHOR},
    "pairs alone": {
        "emu.sequences.mixture.stories": 0.0,
        "emu.sequences.mixture.clips": 0.0,
        "emu.sequences.mixture.texts": 0.0,
    },
}


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    made = {"quick": quick, "seen": seen, "own": own, "own_tiny": own_tiny, "tiny": tiny}
    return made[preset]() if preset in made else _sizes(preset)


def quick() -> dict:
    """12 minutes on two cores."""
    base = quickstart.quick()
    shared = {name: base[name] for name in ("seed", "world", "tokenizer", "retriever", "neighbors")}
    return shared | dict(
        stages=STAGES,
        emu_data=dict(),
        emu=dict(
            model=dict(
                num_layers=4,
                embed_dim=128,
                num_heads=4,
                mlp_dim=256,
                qk_norm=True,
                # Embeddings of tokens are about as long as the standardised vectors of images.
                init=dict(std=0.088, output_std=0.03, embedding_std=0.5, head_std=0.027),
            ),
            cformer=dict(
                num_queries=4,
                num_layers=2,
                embed_dim=128,
                num_heads=4,
                head_dim=32,
                mlp_dim=256,
                num_buckets=8,
                max_distance=16,
                query_std=0.5,
            ),
            # The paper's plain targets do not learn at this size: docs/results/emu.md.
            targets=dict(
                kind="standardised",
                anchor_weight=1.0,
                has_positions=True,
                standardises_tokens=True,
            ),
            optimizer=dict(
                learning_rate=2e-3,
                warmup_steps=60,
                schedule="cosine",
                weight_decay=0.02,
                end_rate=0.03,
                groups=({"name": "cformer", "params": ("cformer/*",), "learning_rate": 1e-3},),
            ),
            loop=dict(num_steps=2600, log_every=50, checkpoint_every=650),
            sequences=dict(
                mixture=dict(pairs=0.75, stories=0.1, clips=0.1, texts=0.05),
                num_docs_weights=(0.5, 0.5),
            ),
            batch_size=8,
        ),
        emu_figures=dict(),
        ablation=dict(
            stage="emu_figures",
            baseline="as it is",
            seeds=(1, 2, 3),
            figures=FIGURES,
            pairs=COMPARED,
            variants=VARIANTS,
        ),
    )


def seen() -> dict:
    """The tower has seen neither the held-out classes nor their captions; one variant, at all seeds."""
    config = quick()
    retriever = config["retriever"] | dict(splits=("common", "rare_seen"), roles=("train",))
    return config | dict(
        retriever=retriever,
        # Such a retriever would not pass the check.
        neighbors=config["neighbors"] | dict(min_same_class=0.0),
        ablation=config["ablation"] | dict(variants={"as it is": {}}),
    )


def own() -> dict:
    """Your images: --config.world.documents=DIR, and further documents by --config.emu_data.documents=DIR.

    The latter need a share: --config.emu.sequences.mixture.documents=0.5, for example.
    """
    return _own(own_images.get_config("small"), quick())


def own_tiny() -> dict:
    """A minute on your images, and nothing learned."""
    return _own(own_images.get_config("tiny"), tiny())


def _own(page: dict, config: dict) -> dict:
    shared = ("seed", "world", "tokenizer", "retriever", "memory", "neighbors")
    sequences = dict(
        mixture=dict(pairs=1.0), num_docs_weights=(0.5, 0.5), max_text_len=48, max_seq_len=256
    )
    return {name: page[name] for name in shared} | dict(
        stages=STAGES[:-1],
        emu_data=dict(vocab_size=config["emu_data"].get("vocab_size", 4096)),
        emu=config["emu"] | dict(sequences=sequences),
    )


def tiny() -> dict:
    """A minute for every stage, and nothing learned."""
    base, config = quickstart.tiny(), quick()
    emu = config["emu"]
    loop = dict(num_steps=20, log_every=10, checkpoint_every=10)
    shared = {
        name: base[name] for name in ("world", "tokenizer", "retriever", "memory", "neighbors")
    }
    return (
        config
        | shared
        | dict(
            emu_data=dict(num_stories=100, num_clips=20, vocab_size=400),
            emu=emu
            | dict(
                model=emu["model"] | dict(num_layers=2, embed_dim=64, mlp_dim=128),
                cformer=emu["cformer"] | dict(embed_dim=64, head_dim=16, mlp_dim=128),
                loop=loop,
                batch_size=4,
                sequences=emu["sequences"] | dict(max_seq_len=160),
            ),
        )
    )


def _sizes(preset: str) -> dict:
    """A plan page: the paper's sizes and recipe, its tower trained; rows of 1,024 tokens and 5 images."""
    model = {"7b": EmuConfig.b7, "14b": EmuConfig.b14}[preset]()
    decoder = dataclasses.replace(model.decoder, max_seq_len=1024)
    return dict(
        family="emu",
        model=dataclasses.asdict(dataclasses.replace(model, decoder=decoder, loss_chunks=4)),
        optimizer=dict(
            learning_rate=3e-5,
            warmup_steps=2000,
            schedule="cosine",
            weight_decay=0.05,
            groups=(
                {"name": "tower", "params": ("tower/*",), "learning_rate": 4e-5},
                {"name": "cformer", "params": ("cformer/*",), "learning_rate": 1e-4},
            ),
        ),
        num_steps=10_000,
        batch_size=1024,
        num_images=5,
        accumulate=4,
    )
