"""Stage `retriever`: trains a CLIP and freezes it, or takes one; it makes all embeddings of a run."""

import dataclasses
from functools import partial

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import checks, manifest_values, run_folder, sharding
from rag_mm.data import pipeline
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.models import clip
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.shared import frozen, given_models, train_tokenizer, world_config
from rag_mm.train import loop, optimizer
from rag_mm.worlds.emoji import emoji_scenes, scene_facts

INPUTS = ("tokenizer",)  # Its text vocabulary, unless the retriever is given.
FOLDER = given_models.FOLDER


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """Architecture of both towers.

    Attributes:
        embed_dim: width of each tower.
        num_heads: attention heads of each tower.
        vision_layers: layers of the image tower.
        text_layers: layers of the text tower.
        patch_size: height and width of an image patch in pixels.
        projection_dim: width of the embeddings.
        max_text_len: maximum length of a text in tokens; longer texts are truncated.
    """

    embed_dim: int = 128
    num_heads: int = 4
    vision_layers: int = 3
    text_layers: int = 2
    patch_size: int = 8
    projection_dim: int = 64
    max_text_len: int = 24

    def __post_init__(self):
        checks.at_least(self, 1, *(field.name for field in dataclasses.fields(self)))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide embed_dim={self.embed_dim}"
            )


@dataclasses.dataclass(frozen=True)
class RetrieverStageConfig(given_models.GivenConfig):
    """How the retriever, a CLIP, is trained.

    Trained on all three splits, it stands for an off-the-shelf CLIP, which has seen the held-out classes;
    trained on `common` and `rare_seen`, it has not seen them.

    Attributes:
        folder: CLIP or SigLIP 2 to use: a run, such as one of `rag-mm import clip`, or its own folder, as
            `retriever` in a memory. It scales images to its own size. None trains `model`.
        seed: seed of the initial weights, the order of the pairs and the choice of captions.
        world: world of the documents.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        model: both towers.
        splits: splits of classes to train on.
        roles: roles of documents to train on: `train`, and `memory`, since a public CLIP may have seen the
            images of a public memory. Never `test`.
        captions_per_image: an image is paired with the shortest of this many random captions. With more
            captions, more of them only name the entity, which then outweighs place and color in a query.
        batch_size: image-caption pairs per step.
        num_eval: number of test pairs that recall is measured on.
        scale: devices, precision, and what is computed in parts. Every pair is compared with all others of
            its batch, on however many devices.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages | world_config.CorpusWorld
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    model: TowersConfig = dataclasses.field(default_factory=TowersConfig)
    splits: tuple[str, ...] = ("common", "rare_seen", "held_out")
    roles: tuple[str, ...] = ("train",)
    captions_per_image: int = 1
    batch_size: int = 256
    num_eval: int = 1000
    scale: scaling.RetrieverScaleConfig = dataclasses.field(
        default=scaling.RetrieverScaleConfig(), metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 1, "captions_per_image", "num_eval")
        known = (*world_config.SEEN, *world_config.HELD_OUT)
        if not self.splits or not set(self.splits) <= set(known):
            raise ValueError(f"splits are {self.splits}; choose from {', '.join(known)}")
        if not self.roles or not set(self.roles) <= {"train", "memory"}:
            raise ValueError(f"roles are {self.roles}; choose from train, memory")
        self.identify(_given_fingerprint)
        if self.folder is None and isinstance(self.world, world_config.CorpusWorld):
            raise ValueError("folder is None, but a corpus has no images to train on; give one")
        if self.folder is None and self.world.image_size % self.model.patch_size:
            raise ValueError(
                f"model.patch_size is {self.model.patch_size}, which does not divide the image size "
                f"{self.world.image_size}"
            )

    def clip_config(self, vocabulary: Vocabulary) -> clip.CLIPConfig:
        """The CLIP's config. Its text tower reads the vocabulary's ids below the codes; `eod` ends a text."""
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
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh)


def run(config: RetrieverStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the CLIP, writes it as a frozen model, and measures recall on test scenes.

    Returns:
        `loss`, unless the CLIP is given, and `recall_at_1`, unless the world has no images, in the leader; {}
        in followers.
    """
    if config.folder is not None:
        return _take_given(config, config.folder, stage_dir / FOLDER)
    exact = train_tokenizer.load_tokenizer(run.workdir).vocabulary
    vocabulary = dataclasses.replace(exact, folds_case=True)  # "Red apple" finds a red apple.
    model_config = config.clip_config(vocabulary)
    sources = [config.world.scenes(role, *config.splits) for role in config.roles]
    images = np.concatenate([world_config.images(source) for source in sources])
    documents = [(source, row) for source in sources for row in range(len(source))]

    def make_pair(index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, row = documents[index]
        numbers = rng.integers(1 << 30, size=config.captions_per_image)
        text = min((source.caption(row, int(number)) for number in numbers), key=len)
        tokens = frozen.text_tokens(model_config, vocabulary, [text])[0]
        return {"images": images[index].astype(np.float32) / 255, "tokens": tokens}

    mesh = make_mesh(config)
    batches = pipeline.make_batches(
        np.arange(len(documents)),
        config.batch_size,
        config.seed,
        make_pair,
        rows=sharding.local_rows(config.batch_size, mesh),
        num_workers=config.scale.num_workers,
        whole_epochs=True,  # An image that is in a batch twice would be its own negative.
    )
    params, log = training.train(
        "retriever",
        stage_dir,
        partial(_make_model, config, model_config),
        partial(clip.loss_fn, num_chunks=config.scale.loss_chunks),
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
    return {"loss": log[-1]["loss"], "recall_at_1": _recall(config, retriever)}


def _make_model(config: RetrieverStageConfig, model_config: clip.CLIPConfig) -> clip.CLIP:
    scale, rngs = config.scale, nnx.Rngs(params=config.seed)
    return clip.CLIP(model_config, rngs=rngs, dtype=scale.dtype, remat=scale.remat)


def load_encoder(path: epath.PathLike, image_batch: int | None = None) -> frozen.FrozenRetriever:
    """Loads the retriever of a run, or a frozen retriever from its own folder (as in a memory).

    Raises:
        UserError: there is no retriever, or its stage is unfinished or edited.
    """
    return frozen.FrozenRetriever(given_models.find_model(path, "retriever"), image_batch)


def inputs(config: RetrieverStageConfig) -> tuple[str, ...]:
    """The stages that it reads with this config."""
    return INPUTS if config.folder is None else ()


def _given_fingerprint(folder: str) -> str:
    return given_models.model_fingerprint(folder, "retriever", frozen.RETRIEVERS)


def _take_given(config: RetrieverStageConfig, given: str, folder: epath.Path) -> dict:
    """Copies the given model; returns what `run` does."""
    if not multiprocess.is_leader():
        return {}
    given_models.copy_model(given_models.find_model(given, "retriever"), folder)
    retriever = frozen.FrozenRetriever(folder)
    config.check_unchanged(retriever.fingerprint)
    if isinstance(config.world, world_config.CorpusWorld):
        return {}
    return {"recall_at_1": _recall(config, retriever)}


def _recall(config: RetrieverStageConfig, retriever: frozen.FrozenRetriever) -> dict[str, float]:
    """Recall@1 among test documents with full captions; any document that fits the query is correct."""
    # In a world of own images, the seen documents were trained on.
    is_own = isinstance(config.world, world_config.OwnImages)
    splits = world_config.TEST if is_own else (*world_config.SEEN, *world_config.TEST)
    source = config.world.scenes("test", *splits)
    rows = world_config.sample_rows(source, config.num_eval, config.seed)
    texts = [source.full_caption(int(row)) for row in rows]
    images = retriever.encode_image(world_config.images(source, rows))
    similarities = retriever.encode_text(texts) @ images.T
    best_hits = {"text_to_image": similarities.argmax(1), "image_to_text": similarities.argmax(0)}
    return {name: _share_right(source, rows, hits, texts) for name, hits in best_hits.items()}


def _share_right(
    source: world_config.SplitDocuments, rows: np.ndarray, hits: np.ndarray, texts: list[str]
) -> float:
    """Share of queries whose hit fits; `hits` int [Q] are indices into `rows` and `texts`."""
    if not isinstance(source, emoji_scenes.Scenes):
        return float(np.mean([texts[hit] == text for hit, text in zip(hits, texts, strict=True)]))
    facts = [source.facts(int(row)) for row in rows]
    is_right = [
        scene_facts.compare(facts[hit], query_facts, source.levels[0])["joint"]
        for hit, query_facts in zip(hits, facts, strict=True)
    ]
    return float(np.mean(is_right))
