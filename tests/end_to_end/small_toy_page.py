"""RECO's preset `toy` with 40 classes and 150 steps."""

from rag_mm.configs import reco

PRESETS = ("toy",)


def get_config(preset: str) -> dict:
    config = reco.get_config(preset)
    fusion = config["fusion"]
    return config | dict(
        world=config["world"] | dict(num_classes=40, num_common=20, num_held_out=8, dim=32),
        toy_pairs=config["toy_pairs"] | dict(num_train=4000),
        fusion=fusion
        | dict(
            loop=fusion["loop"] | dict(num_steps=150, checkpoint_every=150),
            measures=dict(curve_neighbors=(1,), curve_rows=(1,)),
        ),
    )
