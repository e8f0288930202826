"""Few-shot captions on emoji scenes: does it matter how the examples of a prompt are selected?

    rag-mm train --config=configs/few_shot.py:quick --workdir=runs/quickstart --stage=few_shot

Images of held-out classes are captioned after 0, 1 or 2 examples, selected by RICES (nearest in the view
image, text or mixed) or at random. The command adds the stage to a finished quickstart; without `--stage`,
in a folder of its own, the page first runs the quickstart's stages up to the decoder.

    preset  cost on two cores                    what to expect
    quick   a minute after the quickstart's 16   CIDEr by view and number of examples; no figure is claimed
    tiny    a minute                             runs every stage, learns nothing
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
        few_shot=dict(num_test=num_test),
    )
