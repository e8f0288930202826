"""RECO: a frozen CLIP whose embeddings are refined by what they retrieve (arXiv 2306.07196).

Miniatures for two CPU cores, one command each:

    rag-mm ablate --config=configs/reco.py:toy --workdir=runs/reco_toy
    rag-mm ablate --config=configs/reco.py:harder_toy --workdir=runs/reco_harder_toy
    rag-mm ablate --config=configs/reco.py:tiny --workdir=runs/reco_tiny

    preset      cost on two cores         what to expect (accuracy on classes never trained on)
    toy         20 seconds of one core    3 % frozen -> 97 % refined
    harder_toy  a minute                  2 % -> 58 %; modality offset, wrong captions, confusable groups
    tiny        4 minutes                 0 % -> 36 %; a small CLIP on emoji scenes of common classes, frozen
    clip_b32    a pod; not run here       paper: +10.2 points on CUB, +10.9 on Cars, about +1 on generic sets
    clip_l14    a pod; not run here       as clip_b32, with ViT-L/14

How the figures were measured is in docs/results/reco.md. The paper's own setting has CLIP weights, a memory
of image-text pairs (its best one is private; a public one is clearly weaker), and about 10M pairs of CC12M:

    rag-mm import clip clip-vit-base-patch32 --out=runs/clip_b32
    rag-mm memory build --documents=tars --retriever=runs/clip_b32 --out=mem --exclude=test_images
    rag-mm train --config=configs/reco.py:clip_b32 --workdir=runs/reco_b32 \\
        --config.document_pairs.documents=cc12m --config.document_pairs.memory=mem
    rag-mm eval --suite=zeroshot --workdir=runs/reco_b32 --dataset=caltech_birds2011 --refine=both

Several processes (`--coordinator`) share embedding, search and training. The pairs are read from shards on
disk as they are needed: 10M of ViT-L/14 take 31 GB in half precision, their neighbors' row numbers 0.8 GB.
"""

from rag_mm.configs import quickstart

PRESETS = ("toy", "harder_toy", "tiny", "clip_b32", "clip_l14")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    made = {
        "toy": toy,
        "harder_toy": harder_toy,
        "tiny": tiny,
        "clip_b32": clip,
        "clip_l14": clip,
    }
    return made[preset]()


# Measured with the weights of each variant; differences are paired by image.
PAIRS = (
    ("held_out.both", "held_out.frozen"),
    ("common.both", "common.frozen"),
    ("held_out.both", "held_out.mean"),
    ("held_out.image", "held_out.frozen"),
    ("held_out.text", "held_out.frozen"),
    ("held_out.rows removed", "held_out.frozen"),
    ("held_out.rows back", "held_out.both"),
    ("held_out.texts shuffled", "held_out.frozen"),
    ("held_out.query at test", "held_out.frozen"),
    ("held_out.random at test", "held_out.frozen"),
    ("held_out.step 0", "held_out.frozen"),
    ("common.rows removed", "common.both"),
)


def _ablation() -> dict:
    """Search x fusion, retrieval overrides, losses and the mask, each trained on its own."""

    def lookups(search: str, fuse: str) -> dict:
        return {
            f"fusion.search.{side}.{name}": kind
            for side in ("image", "text")
            for name, kind in (("search", search), ("fuse", fuse))
        }

    return dict(
        stage="fusion",
        baseline="RECO",
        figures=(
            "held_out.frozen",
            "held_out.both",
            "held_out.image",
            "held_out.text",
            "held_out.mean",
            "rare_seen.both",
            "rare_seen.image",
            "rare_seen.text",
            "common.frozen",
            "common.both",
            *(f"held_out.k{k}" for k in (1, 2, 5, 20)),
            *(f"held_out.rows{count}" for count in (1, 5, 10)),
        ),
        pairs=PAIRS,
        variants={
            "RECO": {},
            "uni search uni fusion": lookups("uni", "uni"),
            "cross search cross fusion": lookups("cross", "cross"),
            "cross search uni fusion": lookups("cross", "uni"),
            "query as neighbor": {"fusion.search.retrieval_override": "query"},
            "random rows": {"fusion.search.retrieval_override": "random"},
            "no mixed terms": {"fusion.model.loss_terms": ("refined_refined",)},
            "pairs in memory": {"fusion.train_in_memory": True},
            "pairs in memory unmasked": {
                "fusion.train_in_memory": True,
                "fusion.mask_self": False,
            },
        },
    )


def _fusion(num_steps: int, pairs: str = "pairs") -> dict:
    return dict(
        pairs=pairs,
        model=dict(num_heads=4, mlp_ratio=2.0, initial_logit_scale=20.0),
        optimizer=dict(learning_rate=1e-3, warmup_steps=20, schedule="cosine", weight_decay=1e-5),
        loop=dict(num_steps=num_steps, log_every=50, checkpoint_every=num_steps),
    )


def toy() -> dict:
    """20 seconds; 200 classes of concepts, 30 of them never trained on: 3 % -> 97 %."""
    return dict(
        stages=("toy_pairs", "fusion"),
        seed=0,
        world=dict(num_classes=200),
        toy_pairs=dict(),
        fusion=_fusion(500, "toy_pairs"),
        ablation=_ablation(),
    )


def harder_toy() -> dict:
    """A minute; a modality offset, 40 % wrong captions in the memory, confusable groups: 2 % -> 58 %."""
    config = toy()
    # Many rare classes to learn from: of 70, the fusion memorizes the classes instead of retrieving them.
    return config | dict(
        world=dict(
            num_classes=600,
            num_common=150,
            num_held_out=60,
            modality_offset=1.0,
            wrong_captions=0.4,
            class_spread=0.6,
        ),
        toy_pairs=dict(rare_weight=1.0),
        fusion=_fusion(700, "toy_pairs"),
        ablation=config["ablation"] | dict(variants={"RECO": {}}),
    )


def tiny() -> dict:
    """Four minutes; the towers see common classes only, rare ones teach retrieval: 0 % -> 36 %."""
    base = quickstart.quick()
    # Only the tokenizer's text vocabulary is used, so its codebook stays that of k-means.
    loop = dict(num_steps=1, log_every=1, checkpoint_every=1)
    return dict(
        stages=("tokenizer", "retriever", "memory", "pairs", "fusion"),
        seed=0,
        world=dict(levels=("easy", "free"), class_share=0.4),
        tokenizer=base["tokenizer"] | dict(loop=loop, num_eval=64),
        retriever=base["retriever"]
        | dict(
            splits=("common",),
            roles=("train", "memory"),
            loop=dict(num_steps=380, checkpoint_every=380),
        ),
        memory=dict(index="exact"),
        pairs=dict(rare_repeats=4),
        fusion=_fusion(600) | dict(measures=dict(question_weight=0.25)),
        ablation=_ablation(),
    )


def clip() -> dict:
    """The paper's recipe over any CLIP: width and fingerprint come with the memory. Not run at this size."""
    fusion = _fusion(24_400, "document_pairs")  # 10 epochs of 10M pairs
    return dict(
        stages=("document_pairs", "fusion"),
        seed=0,
        world=dict(),
        document_pairs=dict(documents="", memory=""),
        fusion=fusion
        | dict(
            model=dict(),
            optimizer=fusion["optimizer"] | dict(warmup_steps=500),
            loop=dict(num_steps=24_400, log_every=100, checkpoint_every=1000),
            # Near-duplicates of the query in the memory would teach copying.
            search=dict(max_similarity=0.98),
            batch_size=4096,
        ),
    )
