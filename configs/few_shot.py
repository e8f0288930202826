"""Few-shot captions on emoji scenes: does it matter how the examples of a prompt are chosen?

    rag-mm train --config=configs/few_shot.py:quick --workdir=runs/quickstart --stage=few_shot

asks a finished quickstart, whose stages this page repeats; without `--stage`, in a folder of its own, it
makes them first (those after the decoder aside). Pictures of classes never seen are captioned after 0, 1 or
2 examples, which RICES (nearest in the view image, text or mixed) or the lot chose.
"""

from rag_mm.configs import quickstart

PRESETS = ("quick", "tiny")
STAGES = (
    *quickstart.STAGES[: quickstart.STAGES.index("decoder") + 1],
    "few_shot",
)


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    config = quickstart.get_config(preset)
    num_test = {"quick": 256, "tiny": 16}[preset]
    kept = {name: value for name, value in config.items() if name in ("seed", "world", *STAGES)}
    return kept | dict(
        stages=STAGES,
        few_shot=dict(
            shots=(0, 1, 2),
            views=("image", "text", "mixed"),
            order="nearest_last",
            num_test=num_test,
        ),
    )
