"""CM3Leon at the paper's sizes (Yu et al. 2023, Table 3), planned or trained on corpora, and small chains.

    rag-mm plan --config=configs/cm3leon.py:7b --topology=v5e:16x16
    rag-mm train --config=configs/cm3leon.py:350m --workdir=runs/350m --config.world.corpus=CORPUS \\
        --config.retriever.folder=MEM/retriever --config.memory.folder=MEM
    rag-mm train --config=configs/cm3leon.py:mini_models --workdir=runs/mini --config.world.documents=DIR
    rag-mm train --config=configs/cm3leon.py:mini --workdir=runs/mini --config.world.documents=DIR
    rag-mm train --config=configs/cm3leon.py:chain --workdir=runs/cm3leon
    rag-mm train --config=configs/cm3leon.py:decoding --workdir=runs/decoding --reuse=runs/quickstart
    rag-mm ablate --config=configs/cm3leon.py:decoding --workdir=runs/decoding3 --reuse RUN RUN RUN
    rag-mm train --config=configs/cm3leon.py:sft --workdir=runs/sft --reuse=runs/quickstart
    rag-mm ablate --config=configs/cm3leon.py:tuning --workdir=runs/tuning --reuse RUN

    preset  cost, at best, on 256 v5e chips    what to expect
    tiny    a minute to compile                a program of the same shape, for tests
    350m    175,000 steps of 0.5 s             not trained here; the paper's model
    760m    238,000 steps of 1.2 s             not trained here; the paper's model
    7b      300,000 steps of 7.3 s             not trained here; the paper's model
    mini_models    10 minutes on two cores     image tokenizer, retriever and memory of your 64-pixel images
    mini           30 minutes on two cores     and, on a corpus of them, a decoder of 10M parameters
    chain   a minute on two cores              trained: the stages of RA-CM3's quickstart with CM3Leon's
                                               decoder and loss; runs every stage, learns nothing
    decoding       60 minutes on two cores     ways of decoding on the quickstart's model: guidance, contrast,
                                               re-ranking, parallel decoding; with --reuse of a quickstart
    decoding_tiny  2 minutes on two cores      the same on the tiny quickstart, with few settings; for tests
    null_prompts   not run yet                 guidance with and without masked captions in training
    training       not run yet                 other masking, loss and sizes, at three seeds
    sft            10 minutes on two cores     instruction tuning of the quickstart's model on 11 tasks
    sft_tiny       2 minutes on two cores      the same on the tiny quickstart, for tests; learns nothing
    tuning         60 minutes on one core      other mixtures, and LoRA, at one seed
    tuning_tiny    6 minutes on two cores      the same on the tiny quickstart, for tests; learns nothing

`plan` prints what one training step of 8M tokens needs of each chip (docs/results/plans.md). Runs of the
paper's sizes take the image tokenizer of their corpus, and a memory that is given. Learning rate, warm-up and
batch are the paper's; betas, clipping, weight decay and the linear schedule, which ends at a
tenth of the peak, are OPT's, on whose code the paper builds. Left different: the paper restarted 760m and 7b
with a higher rate after one epoch (CM3Leon, figure 3), here one schedule covers all steps. Override single
values with `--config.pretraining.scale.dtype=float32` and the like.
"""

import dataclasses

from rag_mm.configs import own_images, quickstart

from rag_mm.core import configuration
from rag_mm.models import cm3leon
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.perf.plan import chain_sizes

PRESETS = (
    "tiny",
    "350m",
    "760m",
    "7b",
    "mini",
    "mini_models",
    "chain",
    "decoding",
    "decoding_tiny",
    "null_prompts",
    "training",
    "sft",
    "sft_tiny",
    "tuning",
    "tuning_tiny",
)
DECODING_STAGES = ("tokenizer", "retriever", "memory", "neighbors", "decoder", "decoding")
SFT_STAGES = (*DECODING_STAGES[:-1], "sft")
# Examples of each task. Capped mixing draws all about as often, but less of those with a few hundred.
SFT_TASKS = dict(
    text_to_image=4000,
    recolor=4000,
    move=3000,
    swap=6000,
    draw_boxes=3000,
    from_silhouette=800,
    from_edges=800,
    caption=6000,
    what=6000,
    where=3000,
    which_color=400,
)
# Over-reliance, and edits with two conditions; weights of picture and instruction.
SFT_COPIED = tuple(
    f"held_out.{decoder}_copied.copied_{fact}"
    for fact in ("place", "color", "whole")
    for decoder in ("untuned", "tuned")
)
SFT_GUIDED = tuple(
    f"held_out.guided_{task}_{weights}.{figure}"
    for task in ("recolor", "move")
    for weights in ("i0_t1", "i1_t0", "i1_t1", "i1.5_t1", "i2_t1", "i3_t1", "i1_t2", "i1_t3")
    for figure in ("fidelity", "compliance", "joint")
)
SFT_GUIDED_PAIRS = tuple(
    (f"held_out.guided_{task}_{ours}", f"held_out.guided_{task}_{theirs}")
    for task in ("recolor", "move")
    for ours, theirs in (
        ("i1_t1.fidelity", "i0_t1.fidelity"),
        ("i1_t1.compliance", "i1_t0.compliance"),
        ("i1.5_t1.joint", "i1_t1.joint"),
        ("i3_t1.joint", "i1_t1.joint"),
    )
)
SFT_TEXTS = ("caption", "what", "where", "which_color")


def _joint(setting: str) -> str:
    return f"held_out.{setting}.joint"


_BEST, _PLAUSIBLE = "bare_w1.5_t1", "bare_w1.5_t1_plausible0.1"
_CONTRAST = "contrast_k1_a0.1_bare_t1"
# What a table over seeds shows: see `rag-mm ablate --help`.
DECODING_FIGURES = (
    *(
        _joint(f"{null}_w{weight:g}_t{temperature:g}")
        for null in ("bare", "documents", "caption")
        for temperature in (0.4, 0.7, 1.0)
        for weight in (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)
    ),
    *(f"held_out.documents_w0_t0.4.{fact}" for fact in ("entity", "place", "color")),
    *map(_joint, ("plain_t0", _PLAUSIBLE, _CONTRAST, "contrast_k1_a0.5_bare_t1")),
    *map(_joint, ("contrast_k2_a0.5_bare_t1", "contrast_k2_a0.5_bare_floor0.1_t1")),
    *map(_joint, ("contrast_k4_a0.5_bare_t1", "contrast_k4_a0.5_bare_floor0.1_t1")),
    *(f"held_out.contrast_k1_a{alpha:g}_bare_t1.entropy" for alpha in (1.0, 0.5, 0.1)),
    *(
        f"held_out.ranked_{maker}_n{count}.{figure}"
        for maker in ("plain", "contrast", "mixture")
        for count in (1, 2, 4, 8, 16)
        for figure in ("joint", "upper_bound")
    ),
    *(f"held_out.jacobi_plain_t{temperature:g}.passes" for temperature in (0.0, 0.7, 1.0)),
    *(f"held_out.jacobi_uncoupled_plain_t{temperature:g}.passes" for temperature in (0.7, 1.0)),
    *map(_joint, ("jacobi_plain_t0.7", "jacobi_plain_t1")),
    "held_out.jacobi_bare_w1.5_t1.passes",
    *(
        f"held_out.{null}_w{weight:g}_t1.copied_{name}"
        for null in ("bare", "documents", "caption")
        for weight in (1.0, 1.5, 3.0)
        for name in ("place", "color", "whole")
    ),
)
DECODING_PAIRS = tuple(
    (_joint(ours), _joint(theirs))
    for ours, theirs in (
        (_BEST, "bare_w1_t1"),
        ("bare_w3_t1", _BEST),
        ("bare_w5_t0.4", "bare_w1_t0.4"),
        (_PLAUSIBLE, "plain_t1"),
        (_PLAUSIBLE, "plain_t0"),
        (_CONTRAST, _BEST),
        (_CONTRAST, "plain_t1"),
        ("ranked_plain_n4", "ranked_plain_n1"),
        ("ranked_plain_n8", "ranked_plain_n4"),
        ("ranked_mixture_n8", "ranked_plain_n8"),
        ("ranked_mixture_n8", "ranked_contrast_n8"),
        ("jacobi_plain_t0.7", "plain_t0.7"),
        ("jacobi_plain_t1", "plain_t1"),
    )
) + tuple(
    (f"held_out.{ours}.passes", f"held_out.{theirs}.passes")
    for ours, theirs in (
        ("jacobi_plain_t0.7", "jacobi_uncoupled_plain_t0.7"),
        ("jacobi_plain_t1", "jacobi_uncoupled_plain_t1"),
    )
)
# Nothing masks a caption or an image whole, as in CM3Leon's first description of its objective.
UNMASKED = {"decoder.masking.caption_prob": 0.0, "decoder.masking.segment_prob": 0.0}
# Every target counts alike, sentinels and retrieved documents too (CM3Leon, section 2.2).
UNIFORM_LOSS = {
    "decoder.alpha": 1.0,
    "decoder.sentinel_weight": 1.0,
    "decoder.normalize_by": "weights",
}
# About 0.1 and 1.5 M parameters; the quickstart's decoder has 0.4 M in its layers.
SMALL = {"decoder.model.embed_dim": 64, "decoder.model.mlp_dim": 192}
LARGE = {
    "decoder.model.embed_dim": 192,
    "decoder.model.mlp_dim": 576,
    "decoder.model.num_layers": 3,
}


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    made = {
        "tiny": _tiny,
        "mini": mini,
        "mini_models": mini_models,
        "chain": chain,
        "decoding": decoding,
        "decoding_tiny": decoding_tiny,
        "null_prompts": null_prompts,
        "training": training,
        "sft": sft,
        "sft_tiny": sft_tiny,
        "tuning": tuning,
        "tuning_tiny": tuning_tiny,
    }
    return made[preset]() if preset in made else _pretrained(preset)


def chain() -> dict:
    """A minute for every stage of a chain, and nothing learned."""
    config, model = quickstart.tiny(), cm3leon.CM3LeonConfig.tiny()
    values = dataclasses.asdict(model.decoder)
    del values["vocab_size"], values["max_seq_len"]  # They follow from the data.
    shape = configuration.without_defaults(configuration.Section(DecoderConfig), values)
    decoder = {name: value for name, value in config["decoder"].items() if name != "look_back"}
    return config | dict(
        decoder=decoder
        | dict(
            model=shape,
            alpha=model.alpha,
            sentinel_weight=model.sentinel_weight,
            normalize_by=model.normalize_by,
            optimizer=_optimizer(1e-3, 10),
        ),
    )


def decoding() -> dict:
    """Every way of decoding on 256 test scenes of the quickstart's model."""
    config = quickstart.quick()
    return _stages_of(config, DECODING_STAGES) | dict(
        decoding=dict(),
        ablation=dict(
            stage="decoding",
            seeds=quickstart.FRESH_SEEDS,
            figures=DECODING_FIGURES,
            pairs=DECODING_PAIRS,
            variants={"as it is": {}},
        ),
    )


def decoding_tiny() -> dict:
    """One setting of each kind and two of the sweep, on a model that has learned nothing."""
    return _stages_of(quickstart.tiny(), DECODING_STAGES) | dict(
        decoding=dict(
            num_scenes=16,
            temperatures=(0.4, 1.0),
            weights=(0.0, 1.0, 1.5, 3.0),
            nulls=("bare", "documents"),
            plausible_weights=(1.5,),
            plausible_temperatures=(),
            two_conditions=((1.5, 1.0),),
            contrasts=(
                (1, 1.0, 1.0, 0.0, "bare"),
                (1, 0.5, 1.0, 0.0, "bare"),
                (1, 0.1, 1.0, 0.0, "bare"),
                (2, 0.5, 1.0, 0.1, "bare"),
            ),
            num_candidates=(1, 2, 4, 8),
            jacobi_temperatures=(0.0, 1.0),
            speed_batches=(1,),
            num_examples=2,
        ),
    )


def null_prompts() -> dict:
    """Guidance away from null prompts that training showed, or did not."""
    config = decoding()
    weights, temperatures = (0.0, 1.0, 1.5), (0.4, 1.0)
    return config | dict(
        decoding=dict(
            weights=weights,
            temperatures=temperatures,
            num_candidates=(1,),
            two_conditions=(),
            shows_unseen_nulls=True,
        ),
        ablation=dict(
            stage="decoding",
            baseline="as it is",
            seeds=quickstart.FRESH_SEEDS,
            figures=tuple(
                f"held_out.{null}_w{weight:g}_t{temperature:g}.{fact}"
                for null in ("bare", "documents", "caption")
                for temperature in temperatures
                for weight in weights
                for fact in ("joint", "entity", "place", "color")
            ),
            variants={"as it is": {}, "segment masking off": UNMASKED},
        ),
    )


def training() -> dict:
    """The quickstart with other masking, loss and decoder sizes: NLL, images and captions by document."""
    config = quickstart.quick()
    figures = tuple(
        f"held_out.docs{count}.{figure}"
        for figure in ("art_nll", "joint", "cider")
        for count in range(3)
    )
    pairs = tuple(
        (f"held_out.docs{ours}.{figure}", f"held_out.docs{ours - 1}.{figure}")
        for figure in ("art_nll", "joint")
        for ours in (1, 2)
    )
    return config | dict(
        ablation=dict(
            baseline="as it is",
            seeds=quickstart.FRESH_SEEDS,
            figures=figures,
            pairs=pairs,
            variants={
                "as it is": {},
                "segment masking off": UNMASKED,
                "uniform loss": UNIFORM_LOSS,
                "0.1 M": SMALL,
                "1.5 M": LARGE,
            },
        ),
    )


def _stages_of(config: dict, stages: tuple[str, ...]) -> dict:
    """A page with these stages alone."""
    dropped = {*config["stages"], "ablation"} - {*stages}
    return {name: value for name, value in config.items() if name not in dropped} | dict(
        stages=stages
    )


def _pretrained(preset: str) -> dict:
    """A chain over a corpus and a given memory, of the paper's sizes."""
    model, learning_rate, num_steps = {
        "350m": (cm3leon.CM3LeonConfig.m350(), 6e-4, 175_000),
        "760m": (cm3leon.CM3LeonConfig.m760(), 5e-4, 238_000),
        "7b": (cm3leon.CM3LeonConfig.b7(), 1.2e-4, 300_000),
    }[preset]
    return chain_sizes.chain_page(
        "cm3leon",
        model,
        _optimizer(learning_rate, 1500),
        num_steps=num_steps,
        batch_size=2048,  # Rows of 4,096 tokens: 8M tokens.
    )


def _tiny() -> dict:
    """A program of the same shape that compiles in a minute; a page of sizes alone."""
    return dict(
        family="cm3leon",
        model=dataclasses.asdict(cm3leon.CM3LeonConfig.tiny()),
        optimizer=_optimizer(1e-3, 10),
        num_steps=100,
        batch_size=256,
        accumulate=1,
    )


def mini_models() -> dict:
    """What a corpus is made with: the image tokenizer, and a retriever and a memory for its neighbors."""
    config = own_images.get_config("small")
    tokenizer, retriever = config["tokenizer"], config["retriever"]
    loop = dict(log_every=50, checkpoint_every=250)
    return dict(
        stages=("tokenizer", "retriever", "memory"),
        seed=0,
        world=dict(documents="", image_size=64),
        tokenizer=tokenizer
        | dict(
            model=tokenizer["model"] | dict(image_size=64, levels=(16,), codebook_size=512),
            loop=loop | dict(num_steps=1000),
            text=dict(vocab_size=1024),
        ),
        retriever=retriever
        | dict(
            # 64 patches, as of 32-pixel images.
            model=retriever["model"] | dict(patch_size=16, max_text_len=32),
            loop=loop | dict(num_steps=250),
        ),
        memory=dict(index="exact"),
    )


def mini() -> dict:
    """A decoder of 10M parameters on a corpus of the documents of `mini_models`."""
    models, quick = mini_models(), quickstart.quick()["decoder"]
    return models | dict(
        stages=(*models["stages"], "pretraining"),
        pretraining=dict(
            corpora=(dict(path="corpus"),),
            model=quick["model"] | dict(num_layers=3, embed_dim=448, num_heads=8, mlp_dim=1664),
            look_back=(*quick["look_back"][:2], *((),) * 2),
            optimizer=dict(
                learning_rate=1.5e-3, warmup_steps=50, schedule="wsd", weight_decay=0.05
            ),
            loop=dict(num_steps=400, log_every=10, checkpoint_every=50),
            sequences=dict(
                max_seq_len=1152,  # Four images of 256 codes with their texts.
                num_docs_weights=(0.2, 0.4, 0.4),
                max_text_len=32,
                code_noise=0.1,
            ),
            masking=dict(caption_prob=0.2),
            alpha=1.0,
            sentinel_weight=1.0,
            normalize_by="weights",
            batch_size=4,
            num_held_out=256,
        ),
    )


def _optimizer(learning_rate: float, warmup_steps: int) -> dict:
    return dict(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        end_rate=0.1,
    )


def sft() -> dict:
    """Instruction tuning of the quickstart's model; every task is measured on 128 test scenes."""
    return _stages_of(quickstart.quick(), SFT_STAGES) | dict(
        sft=dict(
            optimizer=dict(learning_rate=2e-3, warmup_steps=20, schedule="wsd", weight_decay=0.05),
            loop=dict(num_steps=1000, checkpoint_every=200),
            tasks=SFT_TASKS,
        ),
        ablation=dict(
            stage="sft",
            seeds=quickstart.FRESH_SEEDS,
            figures=(*_sft_figures(), *SFT_COPIED, *SFT_GUIDED),
            pairs=(
                *((_sft_score("tuned", task), _sft_score("untuned", task)) for task in SFT_TASKS),
                *SFT_GUIDED_PAIRS,
            ),
            variants={"as it is": {}},
        ),
    )


def tuning() -> dict:
    """Instruction tuning on edits alone, with proportional mixing, and by LoRA; one seed."""
    config = sft()
    return config | dict(
        ablation=dict(
            stage="sft",
            baseline="as it is",
            seeds=quickstart.FRESH_SEEDS[:1],
            figures=(*_sft_figures(), *SFT_COPIED),
            variants={
                "as it is": {},
                "edits only": {
                    "sft.tasks": {"recolor": 4000, "move": 4000, "swap": 4000},
                    "sft.text_to_image_share": 0.0,
                    "sft.also_measured": tuple(SFT_TASKS),
                },
                "proportional mixing": {"sft.mixing": "proportional"},
                "LoRA": {
                    "sft.lora": {
                        "rank": 16,
                        "targets": ("q", "k", "v", "out", "gate", "up", "down"),
                    }
                },
            },
        ),
    )


def _sft_figures() -> tuple[str, ...]:
    return tuple(
        _sft_score(decoder, task) for task in SFT_TASKS for decoder in ("untuned", "tuned")
    )


def _sft_score(decoder: str, task: str) -> str:
    return f"held_out.{decoder}_{task}.{_sft_figure(task)}"


def _sft_figure(task: str) -> str:
    """The score that stands for a task."""
    return "right" if task in SFT_TEXTS else "joint"


def sft_tiny() -> dict:
    """Few steps on a model that has learned nothing; for tests."""
    config = sft()
    return _stages_of(quickstart.tiny(), SFT_STAGES) | dict(
        sft=config["sft"]
        | dict(
            loop=dict(num_steps=20, log_every=10, checkpoint_every=10),
            tasks=dict.fromkeys(SFT_TASKS, 24),
            batch_size=8,
            num_test=8,
            num_watched=4,
            edit_weights=((0.0, 1.0), (1.0, 1.0), (1.5, 1.0), (1.0, 0.0)),
        ),
    )


def tuning_tiny() -> dict:
    """The variants of `tuning` with few steps on a model that has learned nothing; for tests."""
    plan = tuning()["ablation"]
    few = {"sft.tasks": dict.fromkeys(("recolor", "move", "swap"), 24)}
    variants = plan["variants"] | {"edits only": plan["variants"]["edits only"] | few}
    return sft_tiny() | dict(ablation=plan | dict(variants=variants))
