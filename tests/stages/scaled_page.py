"""One small stage of each kind that trains, of two steps, in batches that split over eight devices."""

from rag_mm.configs import copy_probe, quickstart, reco

PRESETS = ("scenes", "toy")
LOOP = dict(num_steps=2, log_every=2, checkpoint_every=2)


def get_config(preset: str) -> dict:
    return scenes() if preset == "scenes" else toy()


def scenes() -> dict:
    """A tokenizer, and what reads only that."""
    config = copy_probe.tiny()
    tokenizer, probe = config["tokenizer"], config["copy_probe"]
    small = dict(embed_dim=8, width=8, codebook_size=32)
    return config | dict(
        stages=("tokenizer", "retriever", "copy_probe"),
        world=dict(levels=("easy",), class_share=0.03),
        tokenizer=tokenizer
        | dict(model=tokenizer["model"] | small, loop=LOOP, num_init_images=16, num_eval=8),
        retriever=quickstart.tiny()["retriever"] | dict(loop=LOOP, batch_size=40, num_eval=8),
        copy_probe=probe
        | dict(
            model=probe["model"] | dict(embed_dim=16, num_heads=4, mlp_dim=32),
            look_back=(((0, 1),), ()),
            # One kind of batch, so one program.
            sequences=probe["sequences"] | dict(num_docs_weights=(1.0, 0.0, 0.0)),
            loop=LOOP,
            batch_size=8,
            num_watched=4,
        ),
    )


def toy() -> dict:
    """RECO's fusion on embeddings of a toy world."""
    config = reco.toy()
    return config | dict(
        world=dict(num_classes=20, num_common=10, num_held_out=4, dim=16),
        toy_pairs=dict(num_train=400),
        fusion=config["fusion"] | dict(loop=LOOP, batch_size=40),
    )
