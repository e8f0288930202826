"""Does copying from documents emerge? The decoder of the quickstart, with oracle documents.

    rag-mm train --config=configs/copy_probe.py:quick --workdir=runs/copy_probe
    rag-mm ablate --config=configs/copy_probe.py:quick --workdir=runs/copy_ablation

The decoder of `configs/quickstart.py` is tuned here. Codes are those of k-means; no tokenizer is trained.

    preset  cost on two cores  what to expect
    quick   10 to 12 minutes   NLL per art code of held-out classes about 0.1 with an oracle document, 3
                               without (docs/results/copy_probe.md); stops half way if nothing is copied
    tiny    half a minute      runs every stage, copies nothing
"""

from rag_mm.configs import quickstart

PRESETS = ("quick", "tiny")


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    return {"quick": quick, "tiny": tiny}[preset]()


def quick() -> dict:
    """10 to 12 minutes on two cores."""
    return _probe(quickstart.quick()) | {"ablation": ABLATION}


def tiny() -> dict:
    """Half a minute; for tests and a first look, copies nothing."""
    config = _probe(quickstart.tiny())
    return config | dict(copy_probe=config["copy_probe"] | dict(min_gain=0.0, num_test=16))


# No cell of a table may stop half way: only the lucky seeds would be left.
WHOLE = {"copy_probe.min_gain": 0.0}
ABLATION = dict(
    stage="copy_probe",
    baseline="as in quick",
    pairs=(("held_out.docs1.art_nll", "held_out.docs0.art_nll"),),
    variants={
        "as in quick": WHOLE,
        "alpha 1.0": WHOLE | {"copy_probe.alpha": 1.0},
        "no lag": WHOLE | {"copy_probe.look_back": ()},
        "lag 1": WHOLE | {"copy_probe.look_back": (((0, 1),),)},
        "one lag a head": WHOLE | {"copy_probe.look_back": (((0, 1),), ((1, 0),), (), ())},
        "no induction at the start": WHOLE | {"copy_probe.model.induction_init": False},
        "no masks": WHOLE | {"copy_probe.masking.prob": 0.0},
    },
)


def _probe(config: dict) -> dict:
    # One step: the codebook stays that of k-means.
    loop = dict(num_steps=1, log_every=1, checkpoint_every=1)
    return dict(
        stages=("tokenizer", "copy_probe"),
        seed=config["seed"],
        world=config["world"],
        tokenizer=config["tokenizer"] | dict(loop=loop),
        copy_probe=config["decoder"] | dict(min_gain=0.1),
    )
