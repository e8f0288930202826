"""RECO: a frozen CLIP that looks things up (arXiv 2306.07196).

The paper's own setting is CLIP weights, a memory of image-text pairs (its best one is private; a public one
is clearly weaker), and about 10M pairs of CC12M to train on:

    rag-mm import clip clip-vit-base-patch32 --out=runs/clip_b32
    rag-mm memory build --documents=tars --retriever=runs/clip_b32 --out=mem --exclude=test_pictures
    rag-mm train --config=configs/reco.py:clip_b32 --workdir=runs/reco_b32 \\
        --config.document_pairs.documents=cc12m --config.document_pairs.memory=mem
    rag-mm eval --suite=zeroshot --workdir=runs/reco_b32 --dataset=caltech_birds2011 --refine=both
    rag-mm eval --suite=zeroshot --workdir=runs/reco_b32 --dataset=cars196 --refine=both

The paper reports +10.2 points on CUB and +10.9 on Cars for ViT-B/32, and about +1 on generic sets. None of
that was run here: there are no weights and no such data. Miniatures for two CPU cores, one command each:

    rag-mm ablate --config=configs/reco.py:toy --workdir=runs/reco_toy
    rag-mm ablate --config=configs/reco.py:harder_toy --workdir=runs/reco_harder_toy
    rag-mm ablate --config=configs/reco.py:tiny --workdir=runs/reco_tiny

`toy` is a world of embeddings in which held-out classes should go from about 2 % to above 90 %; `harder_toy`
adds a modality offset, wrong captions and confusable groups; `tiny` trains a small CLIP on emoji scenes of
common classes, freezes it, and looks up what it never saw. What came out stands in docs/results/reco.md.
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


# Measured with the weights of each variant; `a - b` is paired picture by picture.
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


def _ablation(stage: str) -> dict:
    """The pairs of search and fusion, the controls, the losses and the mask, each trained anew."""

    def lookups(search: str, fuse: str) -> dict:
        return {
            f"{stage}.search.{side}.{name}": kind
            for side in ("image", "text")
            for name, kind in (("search", search), ("fuse", fuse))
        }

    return dict(
        stage=stage,
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
            "query as neighbor": {f"{stage}.search.retrieval_override": "query"},
            "random rows": {f"{stage}.search.retrieval_override": "random"},
            "no mixed terms": {f"{stage}.model.loss_terms": ("refined_refined",)},
            "pairs in memory": {f"{stage}.train_in_memory": True},
            "pairs in memory unmasked": {
                f"{stage}.train_in_memory": True,
                f"{stage}.mask_self": False,
            },
        },
    )


def _fusion(num_steps: int) -> dict:
    return dict(
        model=dict(
            num_heads=4,
            mlp_ratio=2.0,
            num_layers=1,
            norm_placement="pre",
            is_zero_init=True,
            extra_skip=False,
            type_embedding=False,
            loss_terms=("refined_refined", "refined_text", "image_refined"),
            mask_same_class=True,
            initial_logit_scale=20.0,
        ),
        optimizer=dict(
            learning_rate=1e-3, warmup_steps=20, schedule="cosine", b2=0.98, weight_decay=1e-5
        ),
        loop=dict(num_steps=num_steps, log_every=50, checkpoint_every=num_steps, guard=None),
        search=dict(
            image=dict(search="uni", fuse="cross"),
            text=dict(search="uni", fuse="cross"),
            num_neighbors=10,
            max_similarity=2.0,  # above 1: no row is too similar
            retrieval_override="none",
        ),
        batch_size=256,
        train_in_memory=False,
        mask_self=True,
        curve_neighbors=(1, 2, 5, 20),
        curve_rows=(1, 5, 10),
    )


def toy() -> dict:
    """200 classes of concepts, 30 of them never trained on."""
    return dict(
        stages=("toy_pairs", "toy_fusion"),
        seed=0,
        world=dict(modality_offset=0.0, wrong_captions=0.0, spread=0.8),
        toy_pairs=dict(num_train=20_000),
        toy_fusion=_fusion(500),
        ablation=_ablation("toy_fusion"),
    )


def harder_toy() -> dict:
    """The same with a modality offset, 40 % wrong captions in the memory, and confusable groups."""
    config = toy()
    # Many rare classes to learn from: with 70 of them the fusion learns them by heart instead of looking up.
    return config | dict(
        world=dict(
            num_classes=600,
            num_common=150,
            num_held_out=60,
            modality_offset=1.0,
            wrong_captions=0.4,
            spread=0.6,
        ),
        toy_pairs=dict(num_train=20_000, rare_weight=1.0),
        toy_fusion=_fusion(700),
        ablation=config["ablation"] | dict(variants={"RECO": {}}),
    )


def tiny() -> dict:
    """Emoji scenes. The towers see common classes only; rare ones teach the fusion to look up."""
    base = quickstart.quick()
    # The vocabulary of texts is the tokenizer's; its codes are not used, so the codebook stays k-means.
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
            loop=dict(num_steps=380, log_every=20, checkpoint_every=380, guard=None),
            embed_dim=128,
            vision_layers=3,
            text_layers=2,
            num_eval=1000,
        ),
        memory=dict(index="exact", num_queries=500),
        pairs=dict(captions_per_image=2, rare_repeats=4, max_test=1000),
        fusion=_fusion(600) | dict(curve_rows=(1, 5, 10), question_weight=0.25),
        ablation=_ablation("fusion"),
    )


def clip() -> dict:
    """The paper's recipe (section 7) over any CLIP: width and fingerprint come with the memory."""
    fusion = _fusion(24_400)  # 10 epochs of 10M pairs
    return dict(
        stages=("document_pairs", "document_fusion"),
        seed=0,
        world=dict(),
        document_pairs=dict(documents="", memory="", max_documents=None),
        document_fusion=fusion
        | dict(
            model=fusion["model"] | dict(num_heads=8, mlp_ratio=4.0, initial_logit_scale=100.0),
            optimizer=fusion["optimizer"] | dict(warmup_steps=500),
            loop=dict(num_steps=24_400, log_every=100, checkpoint_every=1000, guard=None),
            # Pairs of the memory that the query nearly is would teach to copy.
            search=fusion["search"] | dict(max_similarity=0.98),
            batch_size=4096,
        ),
    )
