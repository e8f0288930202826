"""Stage `retriever`: a CLIP trained on scenes, then frozen; all embeddings of a run are its."""

import dataclasses
from functools import partial

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import run_folder, sharding
from rag_mm.data import pipeline, vocabulary
from rag_mm.models import clip
from rag_mm.stages import multiprocess, training
from rag_mm.stages.shared import frozen, train_tokenizer, world_config
from rag_mm.train import loop, optimizer
from rag_mm.worlds.emoji import class_splits, emoji_scenes, scene_facts

INPUTS = ("tokenizer",)
FOLDER = "frozen"


@dataclasses.dataclass(frozen=True)
class RetrieverStageConfig:
    """Both towers have one width; `splits` and `roles` say which scenes the retriever may have seen.

    Beside those of the role `train` these may be the memory's own, `memory`, as a CLIP of the public web
    may have seen what a memory of public pictures holds; never those of tests.

    A picture is shown with the shortest of `captions_per_image` captions: the more, the more often with
    nothing but names, and the more the entity outweighs place and colour in a query that tells them all.

    All three splits make `clip:all`, which stands for an off-the-shelf CLIP; `common` alone makes
    `clip:common`.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    splits: tuple[str, ...] = ("common", "rare_seen", "held_out")
    roles: tuple[str, ...] = ("train",)
    embed_dim: int = 128
    num_heads: int = 4
    vision_layers: int = 3
    text_layers: int = 2
    patch_size: int = 8
    projection_dim: int = 64
    max_text_len: int = 24
    captions_per_image: int = 1
    batch_size: int = 256
    num_eval: int = 1000

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        for name in (
            "embed_dim",
            "num_heads",
            "vision_layers",
            "text_layers",
            "patch_size",
            "captions_per_image",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least 1")
        if not self.splits or not set(self.splits) <= set(class_splits.SPLITS):
            known = ", ".join(class_splits.SPLITS)
            raise ValueError(f"splits are {self.splits}, choose some of {known}")
        if not self.roles or not set(self.roles) <= {"train", "memory"}:
            raise ValueError(f"roles are {self.roles}, choose some of train, memory")
        if self.embed_dim % self.num_heads or self.world.image_size % self.patch_size:
            raise ValueError(
                "num_heads divides embed_dim and patch_size the pictures' side, which "
                f"{self.num_heads} and {self.patch_size} do not"
            )

    def model(self, words: vocabulary.Vocabulary) -> clip.CLIPConfig:
        """The towers over a vocabulary's text ids; its `eod` closes a text."""
        tower = partial(
            clip.TowerConfig,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=4 * self.embed_dim,
        )
        return clip.CLIPConfig(
            image_size=self.world.image_size,
            patch_size=self.patch_size,
            vision=tower(num_layers=self.vision_layers),
            text=tower(num_layers=self.text_layers),
            vocab_size=words.code_offset,
            max_text_len=self.max_text_len,
            end_of_text=words.eod,
            projection_dim=self.projection_dim,
        )


def make_mesh(config: RetrieverStageConfig) -> Mesh:
    """What it trains on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size)


def run(config: RetrieverStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains, freezes, and measures on unseen scenes."""
    words = train_tokenizer.load_tokenizer(run.workdir).vocabulary
    model_config = config.model(words)
    sources = [config.world.scenes(role, *config.splits) for role in config.roles]
    pictures = np.concatenate([world_config.images(source) for source in sources])
    places = [(source, row) for source in sources for row in range(len(source))]

    def make_pair(index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, row = places[index]
        draws = rng.integers(1 << 30, size=config.captions_per_image)
        text = min((source.caption(row, int(draw)) for draw in draws), key=len)
        tokens = frozen.text_tokens(model_config, words, [text])[0]
        return {"images": pictures[index].astype(np.float32) / 255, "tokens": tokens}

    mesh = make_mesh(config)
    batches = pipeline.make_batches(
        np.arange(len(places)),
        config.batch_size,
        config.seed,
        make_pair,
        rows=sharding.local_rows(config.batch_size, mesh),
    )
    params, rows = training.train(
        "retriever",
        stage_dir,
        lambda: clip.CLIP(model_config, rngs=nnx.Rngs(params=config.seed)),
        clip.loss_fn,
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
    )
    if not multiprocess.is_leader():
        return {}
    frozen.save_retriever(stage_dir / FOLDER, model_config, words, params)
    retriever = frozen.FrozenRetriever(stage_dir / FOLDER)
    return {"loss": rows[-1]["loss"], "recall_at_1": _recall(config, retriever)}


def load_encoder(path: epath.PathLike) -> frozen.FrozenRetriever:
    """The retriever of a run, or of a folder that holds one (as a memory does).

    Raises:
        UserError: there is none, or its stage is unfinished or edited.
    """
    path = epath.Path(path)
    if (path / "config.json").exists() and (path / frozen.PARAMS).exists():
        return frozen.FrozenRetriever(path)
    return frozen.FrozenRetriever(run_folder.open_run(path).finished_stage("retriever") / FOLDER)


def _recall(config: RetrieverStageConfig, retriever: frozen.FrozenRetriever) -> dict[str, float]:
    """Recall at 1 among unseen documents with all facts told; any that satisfies a caption is a hit."""
    is_own = isinstance(config.world, world_config.OwnImages)  # Its seen ones were trained on.
    splits = world_config.HELD_OUT if is_own else (*world_config.SEEN, *world_config.HELD_OUT)
    source = config.world.scenes("test", *splits)
    rows = world_config.sample_rows(source, config.num_eval, config.seed)
    texts = [source.full_caption(int(row)) for row in rows]
    images = retriever.encode_image(world_config.images(source, rows))
    similarities = retriever.encode_text(texts) @ images.T
    best = {"text_to_image": similarities.argmax(1), "image_to_text": similarities.argmax(0)}

    return {name: _share_right(source, rows, hits, texts) for name, hits in best.items()}


def _share_right(
    source: world_config.DocumentSource, rows: np.ndarray, hits: np.ndarray, texts: list[str]
) -> float:
    """Share of the rows whose hit, a place among them, shows what their caption tells."""
    if not isinstance(source, emoji_scenes.Scenes):
        return float(
            np.mean([texts[hit] == wanted for hit, wanted in zip(hits, texts, strict=True)])
        )
    facts = [source.facts(int(row)) for row in rows]
    right = [
        scene_facts.compare(facts[hit], wanted, source.levels[0])["joint"]
        for hit, wanted in zip(hits, facts, strict=True)
    ]
    return float(np.mean(right))
