"""Stage `retriever`: a CLIP trained on scenes, then frozen; all embeddings of a run are its."""

import dataclasses
from functools import partial

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import run_folder, sharding
from rag_mm.data import pipeline
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.models import clip
from rag_mm.stages import multiprocess, training
from rag_mm.stages.shared import frozen, train_tokenizer, world_config
from rag_mm.train import loop, optimizer
from rag_mm.worlds.emoji import class_splits, emoji_scenes, scene_facts

INPUTS = ("tokenizer",)
FOLDER = "frozen"


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """Both towers, of one width.

    Attributes:
        embed_dim: width of either tower.
        num_heads: attention heads of either.
        vision_layers: blocks of the image tower.
        text_layers: blocks of the text tower.
        patch_size: pixels a side of an image patch.
        projection_dim: width of the embeddings.
        max_text_len: longest text, in tokens; longer ones are truncated.
    """

    embed_dim: int = 128
    num_heads: int = 4
    vision_layers: int = 3
    text_layers: int = 2
    patch_size: int = 8
    projection_dim: int = 64
    max_text_len: int = 24

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}, give at least 1")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide {self.embed_dim}"
            )


@dataclasses.dataclass(frozen=True)
class RetrieverStageConfig:
    """A CLIP trained on scenes of some splits and roles.

    All three splits stand in for an off-the-shelf CLIP, which has seen the held-out classes; `common` and
    `rare_seen` alone make one that has not.

    Attributes:
        seed: of initial weights and of the order of pairs.
        world: where the documents come from.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        model: both towers.
        splits: splits of classes that it is trained on.
        roles: roles of documents that it is trained on: `train`, and `memory` as a public CLIP may have
            seen what a memory of public images holds; never those of tests.
        captions_per_image: an image is shown with the shortest of so many captions. The more, the more often
            it is a mere name, and the more the entity outweighs place and color in a query.
        batch_size: pairs a step.
        num_eval: test pairs to measure recall on.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    model: TowersConfig = dataclasses.field(default_factory=TowersConfig)
    splits: tuple[str, ...] = ("common", "rare_seen", "held_out")
    roles: tuple[str, ...] = ("train",)
    captions_per_image: int = 1
    batch_size: int = 256
    num_eval: int = 1000

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        if self.captions_per_image < 1:
            raise ValueError(f"captions_per_image is {self.captions_per_image}, give at least 1")
        if not self.splits or not set(self.splits) <= set(class_splits.SPLITS):
            known = ", ".join(class_splits.SPLITS)
            raise ValueError(f"splits are {self.splits}, choose some of {known}")
        if not self.roles or not set(self.roles) <= {"train", "memory"}:
            raise ValueError(f"roles are {self.roles}, choose some of train, memory")
        if self.world.image_size % self.model.patch_size:
            raise ValueError(
                f"model.patch_size is {self.model.patch_size}, which does not divide the image "
                f"size {self.world.image_size}"
            )

    def clip_config(self, vocabulary: Vocabulary) -> clip.CLIPConfig:
        """The towers over a vocabulary's text ids; its `eod` ends a text."""
        model = self.model
        tower = partial(
            clip.TowerConfig,
            embed_dim=model.embed_dim,
            num_heads=model.num_heads,
            mlp_dim=4 * model.embed_dim,
        )
        return clip.CLIPConfig(
            image_size=self.world.image_size,
            patch_size=model.patch_size,
            vision=tower(num_layers=model.vision_layers),
            text=tower(num_layers=model.text_layers),
            vocab_size=vocabulary.code_offset,
            max_text_len=model.max_text_len,
            end_of_text=vocabulary.eod,
            projection_dim=model.projection_dim,
        )


def make_mesh(config: RetrieverStageConfig) -> Mesh:
    """What it trains on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size)


def run(config: RetrieverStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains, freezes, and measures on unseen scenes."""
    vocabulary = train_tokenizer.load_tokenizer(run.workdir).vocabulary
    model_config = config.clip_config(vocabulary)
    sources = [config.world.scenes(role, *config.splits) for role in config.roles]
    pictures = np.concatenate([world_config.images(source) for source in sources])
    places = [(source, row) for source in sources for row in range(len(source))]

    def make_pair(index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, row = places[index]
        draws = rng.integers(1 << 30, size=config.captions_per_image)
        text = min((source.caption(row, int(draw)) for draw in draws), key=len)
        tokens = frozen.text_tokens(model_config, vocabulary, [text])[0]
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
    frozen.save_retriever(stage_dir / FOLDER, model_config, vocabulary, params)
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
    source: world_config.SplitDocuments, rows: np.ndarray, hits: np.ndarray, texts: list[str]
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
