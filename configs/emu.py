"""Emu: one decoder over texts and the vectors of images (Sun et al. 2023, arXiv 2307.05222).

    rag-mm train --config=configs/emu.py:quick --workdir=runs/emu --reuse=runs/quickstart
    rag-mm ablate --config=configs/emu.py:quick --workdir=runs/emu3 --reuse RUN RUN RUN
    rag-mm plan --config=configs/emu.py:14b --topology=v5p:4x4x4

    preset  cost on two cores  what it is
    quick   12 minutes         emoji scenes: captions, images' vectors from captions, stories and clips, with
                               and without retrieved documents; the tower is the quickstart's retriever
    seen    12 minutes         the same with a tower that has not seen the held-out classes
    text_alone  12 minutes     quick without the loss of images; quick reports what images cost captions with
                               --config.emu_figures.text_alone=RUN
    llama   by model           no figures are claimed; quick on --config.emu_data.language_model=RUN, a run of
                               `rag-mm import llama`: its sizes, first parameters and tokenizer
    llama_tiny  a minute       the same of tiny, learns nothing
    visual  22 minutes         quick, then a diffusion model that draws images from the codes of captions,
                               and the same trained on codes of images
    sft     15 minutes         quick, then tuned on dialogues about scenes, asked with and without examples
    sft_tiny  two minutes      the same of tiny, learns nothing
    own     by dataset         no figures are claimed; your images and captions, and by emu_data.documents web
                               pages, storyboards and other documents
    own_tiny  a minute         the same, learns nothing
    tiny    a minute           runs every stage, learns nothing; for tests
    visual_tiny  two minutes   the same of visual, learns nothing
    7b      a pod              the paper's ablation on LLaMA 7B; planned, not trained here
    14b     a pod              the paper's model; planned, not trained here
    sd15    a pod              the paper's visual decoder, Stable Diffusion 1.5's; planned, not trained here

Figures are in docs/results/emu.md. The last two have the published optimizer and three learning rates; how
many rows a step had is unknown, and 1,024 rows of 1,024 tokens and 5 images are our choice.
"""

import dataclasses

from rag_mm.configs import own_images, quickstart

from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.visual_decoder import VisualDecoderConfig

PRESETS = (
    *(
        "quick",
        "seen",
        "text_alone",
        "llama",
        "llama_tiny",
        "visual",
        "visual_tiny",
        "sft",
        "sft_tiny",
    ),
    *("own", "own_tiny", "tiny", "7b", "14b", "sd15"),
)
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "emu_data", "emu", "emu_figures")
VISUAL_STAGES = ("rollouts", "visual_decoder", "visual_control", "visual_figures")
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
_TEXT_ALONE = {"emu.image_loss_weight": 0.0, **_NO_ANCHOR}
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
    "8 queries": {"emu.cformer.num_queries": 8},
    "text loss alone": _TEXT_ALONE,
    "pairs alone": {
        "emu.sequences.mixture.stories": 0.0,
        "emu.sequences.mixture.clips": 0.0,
        "emu.sequences.mixture.texts": 0.0,
    },
}


VISUAL_FIGURES = (
    *(
        f"{split}.{variant}.{figure}"
        for split in SPLITS
        for figure in ("mse", "place", "color", "entity")
        for variant in ("none", "oracle", "retrieved", "wrong", "encoded", "control_none")
    ),
    *(f"held_out.guidance_{weight}.mse" for weight in ("1", "1_5", "2", "3")),
    *(f"held_out.null.{fact}" for fact in ("place", "color")),
    *(f"held_out_stories.{variant}.mse" for variant in ("story", "sentence", "first_image")),
)
VISUAL_COMPARED = tuple(
    (f"{split}.{ours}.{figure}", f"{split}.{theirs}.{figure}")
    for split, figure, ours, theirs in (
        ("held_out", "mse", "none", "control_none"),
        ("held_out", "place", "none", "control_none"),
        ("held_out", "mse", "guidance_2", "guidance_1"),
        ("held_out", "mse", "retrieved", "none"),
        ("held_out", "mse", "oracle", "none"),
        ("held_out_stories", "mse", "story", "sentence"),
    )
)
# What may raise the share of entities that are drawn.
VISUAL_VARIANTS = {
    "as it is": {},
    "patches of 4": {"visual_decoder.model.dit.patch_size": 4},
    "twice as wide": {
        "visual_decoder.model.dit.embed_dim": 256,
        "visual_decoder.model.dit.mlp_dim": 512,
    },
    "four times the steps": {"visual_decoder.loop.num_steps": 6400},
    "the noise is predicted": {"visual_decoder.model.noise.prediction": "epsilon"},
    "v is predicted": {"visual_decoder.model.noise.prediction": "v"},
}
SFT_TASKS = ("caption", "what", "where", "which_color")
SFT_MEASURED = (*SFT_TASKS, *(f"{task}_nll" for task in SFT_TASKS))
SFT_FIGURES = (
    *(
        f"{split}.{variant}.{task}"
        for split in SPLITS
        for task in SFT_MEASURED
        for variant in ("untuned", "tuned", "untuned_retrieved", "tuned_retrieved")
    ),
    *(
        f"few_shot_{model}.{variant}.{task}"
        for model in ("untuned", "tuned")
        for task in SFT_MEASURED
        for variant in (
            "none",
            *(f"{choice}_{k}" for choice in ("rices", "random") for k in (1, 2, 4)),
        )
    ),
)
SFT_COMPARED = (
    *((f"held_out.tuned.{task}", f"held_out.untuned.{task}") for task in SFT_TASKS),
    *(
        (f"few_shot_{model}.rices_4.{task}", f"few_shot_{model}.random_4.{task}")
        for model in ("untuned", "tuned")
        for task in SFT_MEASURED
    ),
)


def get_config(preset: str) -> dict:
    """The config of a preset: nested plain values."""
    made = {
        "quick": quick,
        "seen": seen,
        "text_alone": text_alone,
        "llama": llama,
        "llama_tiny": llama_tiny,
        "visual": visual,
        "visual_tiny": visual_tiny,
        "sft": sft,
        "sft_tiny": sft_tiny,
        "own": own,
        "own_tiny": own_tiny,
        "tiny": tiny,
    }
    if preset == "sd15":
        return sd15()
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
                # The same sequences in a step, whatever number of slots an image has.
                counted_slots=4,
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


def visual() -> dict:
    """22 minutes: `quick`, what its captions are rolled out to, and two visual decoders."""
    config = quick()
    return config | dict(
        stages=STAGES + VISUAL_STAGES,
        rollouts=dict(),
        visual_decoder=dict(
            # All else is the default of `models.emu.visual_decoder.VisualDecoderConfig`.
            model=dict(dit=dict(image_size=32)),
            optimizer=dict(
                learning_rate=3e-3,
                warmup_steps=60,
                schedule="cosine",
                b2=0.99,
                weight_decay=0.01,
                end_rate=0.03,
                ema=0.99,
            ),
            loop=dict(num_steps=1600, log_every=50, checkpoint_every=200),
            batch_size=64,
        ),
        visual_control=dict(),
        visual_figures=dict(),
        ablation=config["ablation"]
        | dict(
            stage="visual_figures",
            figures=VISUAL_FIGURES,
            pairs=VISUAL_COMPARED,
            variants=VISUAL_VARIANTS,
        ),
    )


def visual_tiny() -> dict:
    """Two minutes for every stage of `visual`, and nothing learned."""
    config = visual()
    visual_decoder = config["visual_decoder"]
    return (
        config
        | {name: value for name, value in tiny().items() if name not in ("stages", "ablation")}
        | dict(
            visual_decoder=visual_decoder
            | dict(
                model=dict(dit=dict(embed_dim=32, num_layers=2, mlp_dim=64)),
                loop=dict(num_steps=20, log_every=10, checkpoint_every=10),
                batch_size=8,
                num_watched=8,
            ),
            visual_figures=dict(num_scenes=16, num_stories=12, guidances=(1.0, 2.0)),
        )
    )


def text_alone() -> dict:
    """The control of joint training: the same sequences, of which texts alone are learned."""
    config = quick()
    del config["ablation"]
    targets = config["emu"]["targets"] | dict(anchor_weight=0.0)
    return config | dict(emu=config["emu"] | dict(image_loss_weight=0.0, targets=targets))


def llama() -> dict:
    """On an imported LLaMA, as the paper: its parameters, its tokenizer, and learning rates for it."""
    return _on_llama(quick())


def llama_tiny() -> dict:
    """A minute on a tiny LLaMA, and nothing learned."""
    return _on_llama(tiny())


def _on_llama(config: dict) -> dict:
    optimizer = config["emu"]["optimizer"] | dict(
        learning_rate=3e-5,
        groups=({"name": "cformer", "params": ("cformer/*",), "learning_rate": 1e-4},),
    )
    return config | dict(emu=config["emu"] | dict(model=None, optimizer=optimizer))


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


def sft() -> dict:
    """15 minutes: `quick`, then updates of low rank trained on dialogues about scenes."""
    config = quick()
    return config | dict(
        stages=(*STAGES[:-1], "emu_sft"),
        emu_sft=dict(
            optimizer=dict(
                learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.0
            ),
            loop=dict(num_steps=600, log_every=50, checkpoint_every=300),
        ),
        ablation=config["ablation"]
        | dict(
            stage="emu_sft",
            figures=SFT_FIGURES,
            pairs=SFT_COMPARED,
            variants={"as it is": {}},
        ),
    )


def sft_tiny() -> dict:
    """Two minutes for every stage of `sft`, and nothing learned."""
    config = sft()
    return (
        config
        | {name: value for name, value in tiny().items() if name not in ("stages", "ablation")}
        | dict(
            emu_sft=config["emu_sft"]
            | dict(
                loop=dict(num_steps=20, log_every=10, checkpoint_every=10),
                dialogues=dict(num_scenes=100),
                batch_size=4,
                num_test=12,
                num_few_shot=8,
                shots=(0, 2),
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


def sd15() -> dict:
    """A plan page: the paper's visual decoder and recipe; its rate falls in steps, ours in a line."""
    return dict(
        family="emu_visual",
        model=dataclasses.asdict(VisualDecoderConfig.sd15()),
        optimizer=dict(
            learning_rate=1e-4,
            warmup_steps=5000,
            schedule="linear",
            b2=0.999,
            weight_decay=0.01,
            end_rate=0.1,
        ),
        num_steps=15_000,
        batch_size=1600,
        accumulate=5,
    )
