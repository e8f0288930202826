"""Stages `decoder` and `control`: train RA-CM3 or CM3Leon, and the baseline without retrieved documents.

The family is a matter of the config's values: the decoder's shape, and how targets count (`models.ra_cm3`,
`models.cm3leon`).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import (
    checks,
    configuration,
    files,
    manifest_values,
    run_folder,
    sharding,
)
from rag_mm.core.errors import UserError
from rag_mm.data.sequences import Layout
from rag_mm.data.token_documents import Example
from rag_mm.decode.tasks import Generator
from rag_mm.models import cm3, ra_cm3
from rag_mm.nn import lora, param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.ra_cm3 import copy_metrics, decoder_record, null_prompts
from rag_mm.stages.ra_cm3.training_sequences import (
    MaskingConfig,
    SequencesConfig,
    SequenceSource,
)
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    frozen,
    starting_point,
    train_tokenizer,
    world_config,
)
from rag_mm.train import checkpoint, loop, optimizer

INPUTS = ("tokenizer", "memory", "neighbors")
CONTROL_INPUTS = ("tokenizer",)
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class DecoderStageConfig(starting_point.StartConfig):
    """Data, model and training of a decoder.

    Attributes:
        seed: seed of the initial weights, the order of sequences and the random choices in each.
        world: world of the documents.
        model: a `DecoderConfig` without vocabulary size and length, which follow from the data.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        sequences: documents, captions and lengths of a training sequence.
        masking: which spans are moved to the end of a sequence.
        alpha: loss weight of the targets in retrieved documents (docs/papers/ra_cm3.md#loss); 1 in CM3Leon.
        sentinel_weight: loss weight of the targets that are sentinels; 0 as in CM3, 1 in CM3Leon.
        normalize_by: what the weighted sum of losses is divided by: main, the number of targets in main
            documents; or weights, the sum of all weights (CM3Leon).
        look_back: for each head or group of heads, the places that its keys are mixed from, as (rows up,
            codes to the left) in the image's grid, the finest of a pyramid: `model.smear_lags` for any grid.
            (0, 1) is also a text's previous token. Images of further sizes are looked at with the same lags.
        is_baseline: train the baseline: the same main documents in the same order, without retrieved ones.
        batch_size: sequences per step.
        num_watched: number of scenes of tune classes on which copying is measured at every checkpoint.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    model: Mapping[str, Any] = dataclasses.field(
        metadata=configuration.part_of(
            DecoderConfig, ("vocab_size", "max_seq_len", "dtype", "remat", "context_dim")
        )
    )
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    sequences: SequencesConfig = dataclasses.field(default_factory=SequencesConfig)
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    alpha: float = 0.1
    sentinel_weight: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)
    normalize_by: str = dataclasses.field(default="main", metadata=manifest_values.ADDED_LATER)
    look_back: tuple[tuple[tuple[int, int], ...], ...] = dataclasses.field(
        default=(), metadata=manifest_values.ADDED_LATER
    )
    is_baseline: bool = False
    batch_size: int = 32
    num_watched: int = 64
    scale: scaling.DecoderScaleConfig = dataclasses.field(
        default_factory=scaling.DecoderScaleConfig
    )

    def __post_init__(self):
        super().__post_init__()
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 0, "alpha", "sentinel_weight")
        checks.one_of(self, "normalize_by", cm3.NORMALIZE_BY)
        checks.at_least(self, 1, "num_watched")
        sizes = dict(vocab_size=VOCAB_MULTIPLE, max_seq_len=1)
        shape = configuration.make(DecoderConfig, {**sizes, **self.model}, "model")
        if self.look_back and shape.smear_lags:
            raise ValueError("look_back and model.smear_lags say the same; give one of them")
        if shape.head_dim is None and shape.embed_dim % shape.num_heads:
            raise ValueError(
                f"model.num_heads is {shape.num_heads}, which does not divide embed_dim={shape.embed_dim}"
            )
        # As many entries as heads or groups of heads; in a grid wide enough for any place.
        _ = dataclasses.replace(shape, smear_lags=self.smear_lags(64)).block

    def layout(self, num_codes: int) -> Layout:
        """The layout of the decoder's sequences, for images of `num_codes` codes."""
        sequences = self.sequences
        return Layout(
            max_docs=0 if self.is_baseline else sequences.max_docs,
            max_text_len=sequences.max_text_len,
            num_codes=num_codes,
            max_spans=self.masking.max_spans,
            kind=sequences.layout,
            max_seq_len=sequences.max_seq_len,
        )

    def smear_lags(self, columns: int) -> tuple[tuple[int, ...], ...]:
        """`look_back` as lags in tokens, for a grid of `columns` columns.

        Raises:
            UserError: a place is not before the token.
        """
        lags = tuple(
            tuple(rows * columns + left for rows, left in places) for places in self.look_back
        )
        if min((lag for places in lags for lag in places), default=1) < 1:
            raise UserError(
                f"look_back is {self.look_back}; give places before the token in a grid of {columns} columns."
            )
        return lags


def make_mesh(config: DecoderStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: DecoderStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the decoder, or the baseline where `is_baseline`; returns its metrics."""
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    corpus = coded_corpus.Corpus(
        config.layout(coded_corpus.image_len(image_tokenizer)), image_tokenizer
    )
    source = config.world.scenes("train", *world_config.SEEN)
    documents: list[Example] = []
    neighbors = None
    if not config.is_baseline:
        documents = corpus.memory(build_memory.open_memory(run))
        neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")
        num_captions = config.sequences.captions_per_image
        if neighbors.shape[:2] != (len(source), num_captions + 1):
            raise UserError(
                f"decoder.sequences.captions_per_image is {num_captions}, but the neighbors were "
                f"retrieved for {neighbors.shape[1] - 1} captions; give both stages the same number."
            )
    watch = _make_watch(config, run, corpus, documents)
    # Training must not read documents of held-out classes, which come last in the memory.
    num_seen = len(build_memory.open_memory(run, build_memory.SEEN_VERSION)) if documents else 0
    training_source = make_sequences(config, corpus, source, documents[:num_seen], neighbors)
    return fit(config, stage_dir, image_tokenizer, training_source, watch)


def make_sequences(
    config: DecoderStageConfig,
    corpus: coded_corpus.Corpus,
    source: world_config.SplitDocuments,
    memory: list[Example],
    neighbors: np.ndarray | None,
) -> SequenceSource:
    """The training sequences of all documents of `source`.

    Args:
        config: of the decoder or the baseline.
        corpus: layout and image tokenizer.
        source: main documents; each gets `captions_per_image` captions and a full one.
        memory: documents that may be retrieved.
        neighbors: see `SequenceSource`.
    """
    codes, num_captions = corpus.codes(source), config.sequences.captions_per_image
    captions = [
        [*(source.caption(i, number) for number in range(num_captions)), source.full_caption(i)]
        for i in range(len(source))
    ]
    texts = [[corpus.example(text, codes[i]) for text in group] for i, group in enumerate(captions)]
    vocabulary = corpus.image_tokenizer.vocabulary
    resized = tuple(corpus.codes(source, image_size=s) for s in vocabulary.image_sizes[1:])
    return SequenceSource(
        config.sequences,
        config.masking,
        corpus.layout,
        vocabulary,
        texts,
        memory,
        neighbors,
        resized,
    )


def fit(
    config: DecoderStageConfig,
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    source: SequenceSource,
    watch: copy_metrics.CopyWatch,
) -> dict:
    """Trains a decoder on the sequences of `source` and writes it to `stage_dir`.

    Returns:
        `train` (the last logged metrics), `tokens` (the number trained on, within a batch) and `cut_texts`
        (the share of captions that were truncated) in the leader, {} in followers.

    Raises:
        UserError: `watch` ends the training.
        FloatingPointError: the loss is not finite.
    """
    layout, mesh = source.layout, make_mesh(config)
    model_config = make_model_config(config, image_tokenizer, layout)
    make_model = config.extend(
        partial(decoder_record.make_model, model_config, config.seed), config.seed
    )
    graphdef, abstract = param_trees.describe(make_model, None)
    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make_model,
        lora.with_dropout(partial(ra_cm3.loss_fn, config=model_config)),
        source.batches(
            config.batch_size,
            config.seed,
            sharding.local_rows(config.batch_size, mesh),
            config.scale.num_workers,
        ),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        start=config.start(stage_dir.parent),
        what=config.what_trains(abstract),
        watch=lambda step, params: watch(
            step, _make_generator(frozen.LoadedModel(graphdef, params), image_tokenizer, layout)
        ),
    )
    checkpoint.save_params(stage_dir / "params", config.merge(params))
    if not multiprocess.is_leader():
        return {}
    shown = null_prompts.shown(config.masking, config.sequences, config.is_baseline)
    decoder_record.write(stage_dir, image_tokenizer, layout, model_config, shown)
    train = {k: v for k, v in log[-1].items() if k != "step"}
    cut = _share_cut(source.texts)
    # Approximate: the sampled shares of document counts differ a little from the weights.
    tokens = round(config.loop.num_steps * config.batch_size * source.mean_length)
    return {"train": train, "tokens": tokens, "cut_texts": cut}


def _make_watch(
    config: DecoderStageConfig,
    run: run_folder.Run,
    corpus: coded_corpus.Corpus,
    documents: list[Example],
) -> copy_metrics.CopyWatch:
    """Measures copying on test scenes of tune classes, each with the best document it retrieves."""
    source = config.world.scenes("test", *world_config.TUNE)
    docs: list[list[Example]]
    if config.is_baseline:
        rows = world_config.sample_rows(source, config.num_watched, config.seed)
        docs = [[] for _ in rows]
    else:
        folder = run.finished_stage("neighbors")
        rows = files.read_array(folder / "tune_rows.npy")
        best = files.read_array(folder / "tune_text.npy")[:, :1]
        watched = world_config.evenly_spaced(np.arange(len(rows)), config.num_watched)
        rows, docs = rows[watched], [coded_corpus.pick(documents, ids) for ids in best[watched]]
    mains, art = corpus.test(source, rows)
    return copy_metrics.CopyWatch(mains, docs, art, config.loop.num_steps)


def load_generator(
    run: run_folder.Run,
    stage: str,
    image_tokenizer: frozen.FrozenTokenizer,
    mesh: Mesh | None = None,
) -> Generator:
    """Loads a trained decoder of a run, such as of the stage `sft`, with the layout of its training.

    Args:
        run: the run.
        stage: name of the stage.
        image_tokenizer: of the run.
        mesh: on which it decodes (`decode_batch.make_mesh`); None: on one device.

    Raises:
        UserError: the stage is missing, unfinished or edited, has no decoder, was trained on another
            tokenizer's codes, or does not split over the mesh.
    """
    return load_params(decoder_record.find_folder(run, stage), image_tokenizer, mesh)


def load_params(
    stage_dir: epath.Path, image_tokenizer: frozen.FrozenTokenizer, mesh: Mesh | None = None
) -> Generator:
    """Loads what `fit` wrote; raises as `load_generator` does."""
    record = decoder_record.read(stage_dir, image_tokenizer)
    make_model = partial(decoder_record.make_model, record.model, 0)
    loaded = frozen.load_params(stage_dir / "params", make_model, mesh)
    return _make_generator(loaded, image_tokenizer, record.layout, record.null_prompts)


def _make_generator(
    loaded: frozen.LoadedModel,
    image_tokenizer: frozen.FrozenTokenizer,
    layout: Layout,
    shown: Iterable[str] = (),
) -> Generator:
    vocabulary = image_tokenizer.vocabulary
    num_codes_at = {
        size: coded_corpus.num_codes_at(image_tokenizer, size) for size in vocabulary.image_sizes
    }
    return Generator(
        loaded.graphdef, loaded.params, vocabulary, layout, num_codes_at, frozenset(shown)
    )


def make_model_config(
    config: DecoderStageConfig, image_tokenizer: frozen.FrozenTokenizer, layout: Layout
) -> ra_cm3.RACM3Config:
    """The model's config: the vocabulary size is rounded up, and all positions of the layout are covered."""
    vocabulary = image_tokenizer.vocabulary
    vocab_size = -(-vocabulary.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    lags = config.smear_lags(image_tokenizer.grids[-1][1])
    model = dict(config.model) | ({"smear_lags": lags} if lags else {})
    model |= {"dtype": config.scale.dtype, "remat": config.scale.remat}
    shape = DecoderConfig(vocab_size=vocab_size, max_seq_len=layout.num_positions, **model)
    return ra_cm3.RACM3Config(
        shape,
        vocabulary.code_offset,
        config.alpha,
        config.scale.loss_chunks,
        sentinel_weight=config.sentinel_weight,
        normalize_by=config.normalize_by,
    )


def _share_cut(texts: list[list[Example]]) -> float:
    """Share of captions that were truncated."""
    return float(np.mean([example.num_cut > 0 for captions in texts for example in captions]))
