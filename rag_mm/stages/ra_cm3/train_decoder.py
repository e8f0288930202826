"""Stages `decoder` and `control`: train RA-CM3 or CM3Leon, and the baseline without retrieved documents.

The family is a matter of the config's values: the decoder's shape, and how targets count (`models.ra_cm3`,
`models.cm3leon`).
"""

import dataclasses
from functools import partial

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data.sequences import Layout
from rag_mm.data.token_documents import Example
from rag_mm.decode.tasks import Generator
from rag_mm.stages import multiprocess
from rag_mm.stages.ra_cm3 import copy_metrics, decoder_record, decoder_training, null_prompts
from rag_mm.stages.ra_cm3.training_sequences import SequencesConfig, SequenceSource
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    frozen,
    train_tokenizer,
    world_config,
)

INPUTS = ("tokenizer", "memory", "neighbors")
CONTROL_INPUTS = ("tokenizer",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderStageConfig(decoder_training.DecoderTrainingConfig):
    """Data, model and training of a decoder.

    Attributes:
        world: world of the documents.
        sequences: documents, captions and lengths of a training sequence.
        is_baseline: train the baseline: the same main documents in the same order, without retrieved ones.
        num_watched: number of scenes of tune classes on which copying is measured at every checkpoint.
    """

    world: world_config.EmojiWorld | world_config.OwnImages
    sequences: SequencesConfig = dataclasses.field(default_factory=SequencesConfig)
    is_baseline: bool = False
    num_watched: int = 64

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(self, 1, "num_watched")

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
    mesh = decoder_training.make_mesh(config)
    fitted = decoder_training.fit(
        config,
        stage_dir,
        image_tokenizer,
        source.layout,
        source.batches(
            config.batch_size,
            config.seed,
            sharding.local_rows(config.batch_size, mesh),
            config.scale.num_workers,
        ),
        watch,
        null_prompts.shown(config.masking, config.sequences, config.is_baseline),
    )
    if not multiprocess.is_leader():
        return {}
    cut = _share_cut(source.texts)
    # Approximate: the sampled shares of document counts differ a little from the weights.
    tokens = round(config.loop.num_steps * config.batch_size * source.mean_length)
    return {"train": fitted.train, "tokens": tokens, "cut_texts": cut}


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
    return decoder_training.make_generator(
        loaded, image_tokenizer, record.layout, record.null_prompts
    )


def _share_cut(texts: list[list[Example]]) -> float:
    """Share of captions that were truncated."""
    return float(np.mean([example.num_cut > 0 for captions in texts for example in captions]))
