"""RECO: a frozen CLIP that looks things up (arXiv 2306.07196).

rag-mm train --config=configs/reco.py:toy --workdir=runs/reco_toy
rag-mm ablate --config=configs/reco.py:toy --workdir=runs/reco_toy_table
"""

PRESETS = ("toy", "harder_toy")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    return {"toy": toy, "harder_toy": harder_toy}[preset]()


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
            "query as neighbor": {f"{stage}.search.control": "query"},
            "random rows": {f"{stage}.search.control": "random"},
            "no mixed terms": {f"{stage}.model.loss_terms": ("refined_refined",)},
            "pairs in memory": {f"{stage}.train_in_memory": True},
            "pairs in memory unmasked": {
                f"{stage}.train_in_memory": True,
                f"{stage}.mask_self": False,
            },
        },
    )


def _fusion(num_steps: int, learning_rate: float = 1e-3) -> dict:
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
            learning_rate=learning_rate,
            warmup_steps=20,
            schedule="cosine",
            b2=0.98,
            weight_decay=1e-5,
        ),
        loop=dict(num_steps=num_steps, log_every=50, checkpoint_every=num_steps),
        search=dict(
            image=dict(search="uni", fuse="cross"),
            text=dict(search="uni", fuse="cross"),
            num_neighbors=10,
            max_similarity=2.0,
            control="none",
        ),
        batch_size=256,
        train_in_memory=False,
        mask_self=True,
    )


def toy() -> dict:
    """Section 12's world."""
    return dict(
        stages=("toy_pairs", "toy_fusion"),
        seed=0,
        world=dict(modality_offset=0.0, wrong_captions=0.0, spread=0.8),
        toy_pairs=dict(num_train=20_000),
        toy_fusion=_fusion(500),
        ablation=_ablation("toy_fusion"),
    )


def harder_toy() -> dict:
    """harder."""
    config = toy()
    return config | dict(
        world=dict(modality_offset=1.0, wrong_captions=0.4, spread=0.6),
        ablation=dict(config["ablation"], variants={"RECO": {}}),
    )
