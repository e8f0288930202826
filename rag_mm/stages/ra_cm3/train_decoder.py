"""Stages `decoder` and `control`: RA-CM3 on retrieved documents, and the same main documents without."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import grain
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.core.roles import MAIN
from rag_mm.data import masking, pipeline, sequences
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode.tasks import Generator
from rag_mm.models import ra_cm3
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages import multiprocess, training
from rag_mm.stages.ra_cm3 import copy_metrics
from rag_mm.stages.shared import build_memory, coded_corpus, frozen, train_tokenizer, world_config
from rag_mm.train import checkpoint, loop, optimizer

INPUTS = ("tokenizer", "memory", "neighbors")
CONTROL_INPUTS = ("tokenizer",)
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class DecoderStageConfig:
    """`model` holds a `DecoderConfig`'s values except its vocabulary and length, which follow from the data.

    Attributes:
        max_docs: most documents in a row.
        num_docs_weights: how often a batch holds 0, 1, .. max_docs documents a row (RA-CM3: uniform).
        is_vanilla: the control, which reads the same main documents in the same order and no others.
        max_text_len: room for a caption, in tokens.
        full_caption_prob: share of rows whose main caption tells all facts, as at inference, whatever was told
            to the retriever.
        code_noise: share of the main image's codes that are read as another code of the row, so that a copy
            goes on behind a mistake of its own; what is to be foreseen stays true.
        mean_doc_text_len: room a training row has for a document's caption, on average; a row that needs
            more, which is rare, loses its first document.
        mask_prob: share of rows with masked spans, the others being plain causal rows.
        segment_mask_prob: share of masked rows that mask whole captions or images.
        caption_mask_prob: share of rows that mask the main caption and nothing else, as captioning does;
            by `segment_mask_prob` alone a caption of the main document is masked in few rows.
        num_watched: unseen scenes on which copying is watched at every checkpoint.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    model: Mapping[str, Any]
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    captions_per_image: int
    max_docs: int = 2
    num_docs_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    is_vanilla: bool = False
    max_text_len: int = 24
    full_caption_prob: float = 0.0
    code_noise: float = 0.0
    mean_doc_text_len: int = 24
    max_spans: int = 3
    mask_prob: float = 0.5
    segment_mask_prob: float = 0.5
    caption_mask_prob: float = 0.0
    alpha: float = 0.1
    batch_size: int = 32
    num_watched: int = 64
    mesh: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        if len(self.num_docs_weights) != self.max_docs + 1:
            raise UserError(
                f"num_docs_weights has {len(self.num_docs_weights)} values; give {self.max_docs + 1}, "
                f"one for each count from 0 to max_docs={self.max_docs}."
            )
        if min(self.num_docs_weights) < 0 or not sum(self.num_docs_weights):
            raise ValueError(f"num_docs_weights are {self.num_docs_weights}, give positive numbers")
        if not 0 <= self.mean_doc_text_len <= self.max_text_len:
            raise ValueError(
                f"mean_doc_text_len is {self.mean_doc_text_len}, give 0 to max_text_len={self.max_text_len}"
            )
        if self.captions_per_image < 1:
            raise ValueError(f"captions_per_image is {self.captions_per_image}, give at least 1")
        training.check_config(self.optimizer, self.loop, self.batch_size)
        for name in ("full_caption_prob", "code_noise", "caption_mask_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, give a number in [0, 1]")
        masking.Masking(0, self.segment_mask_prob, self.mask_prob)
        shape = DecoderConfig(vocab_size=VOCAB_MULTIPLE, max_seq_len=1, **dict(self.model))
        if shape.head_dim is None and shape.embed_dim % shape.num_heads:
            raise ValueError(
                f"model.num_heads is {shape.num_heads}, which does not divide {shape.embed_dim}"
            )

    def layout(self, num_codes: int) -> sequences.Layout:
        """The rows this decoder reads."""
        max_docs = 0 if self.is_vanilla else self.max_docs
        return sequences.Layout(max_docs, self.max_text_len, num_codes, self.max_spans)


@dataclasses.dataclass(frozen=True, eq=False)
class RowSource:
    """Makes training rows: transform(index, rng) of `data.pipeline`.

    `texts[i][d]` is draw d of main document i's caption, the last one with all facts; `neighbors` is int32
    [R, draws + 1, K] into `memory`, or None for the control.
    """

    config: DecoderStageConfig
    layout: sequences.Layout
    vocabulary: Vocabulary
    texts: list[list[sequences.Example]]
    memory: list[sequences.Example]
    neighbors: np.ndarray | None

    def make(
        self, index: np.int64, rng: np.random.Generator, num_docs: int
    ) -> dict[str, np.ndarray]:
        """One row of at most `num_docs` documents.

        The main document is drawn first, so that the control sees the same ones.
        """
        config, draws = self.config, self.texts[index]
        draw = int(rng.integers(config.captions_per_image))
        main, docs = draws[-1 if rng.random() < config.full_caption_prob else draw], []
        if self.neighbors is not None:
            column = draw if rng.random() < 0.5 else config.captions_per_image
            found = self.neighbors[index, column]
            chosen = rng.permutation(found[found >= 0])[:num_docs]
            docs = [self.memory[i] for i in chosen]
        length = self.row_length(num_docs)
        while sequences.find_segments(self.layout, main, docs)[-1, 1] + 1 + self.room > length:
            docs = docs[1:]
        segments = sequences.find_segments(self.layout, main, docs)
        if rng.random() < config.caption_mask_prob:
            spans = segments[-2:-1]
        else:
            masks = masking.Masking(0, config.segment_mask_prob, config.mask_prob)
            spans = masking.sample_spans(masks, segments, rng, config.max_spans)
        row = sequences.make_row(self.layout, self.vocabulary, main, docs, spans)
        self._disturb(row, rng)
        return {name: values[:length] for name, values in row.items()}

    def _disturb(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """Puts codes from elsewhere in the row for some of the main image, as read, not as foreseen."""
        tokens, is_code = row["tokens"], row["tokens"] >= self.vocabulary.code_offset
        is_main = is_code & (np.roll(row["roles"], 1) == MAIN)
        wrong = np.flatnonzero(is_main & (rng.random(len(tokens)) < self.config.code_noise))
        tokens[wrong] = rng.choice(tokens[is_code], len(wrong))

    @property
    def room(self) -> int:
        """Tokens that masking may add to a row."""
        return self.layout.length - self.layout.moved_start

    def row_length(self, num_docs: int) -> int:
        """Tokens of a row of `num_docs` documents, so that little of it is padding."""
        layout = self.layout
        num_docs = min(num_docs, layout.max_docs)
        alone = dataclasses.replace(layout, max_docs=0).length
        return alone + num_docs * (
            layout.slot - layout.max_text_len + self.config.mean_doc_text_len
        )

    def batches(self, rows: range | None = None) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Every batch holds rows of one number of documents: what they lack would be padding.

        `rows` are those that this process makes (`sharding.local_rows`).
        """
        config = self.config
        return pipeline.make_batches(
            np.arange(len(self.texts)),
            config.batch_size,
            config.seed,
            *(partial(self.make, num_docs=count) for count in range(config.max_docs + 1)),
            shares=config.num_docs_weights,
            rows=rows,
        )

    @property
    def num_tokens(self) -> int:
        """Positions trained on, padding included, to within a batch."""
        config = self.config
        shares = np.asarray(config.num_docs_weights) / np.sum(config.num_docs_weights)
        lengths = [self.row_length(count) for count in range(config.max_docs + 1)]
        return round(config.loop.num_steps * config.batch_size * float(shares @ lengths))


def make_mesh(config: DecoderStageConfig) -> Mesh:
    """What it trains on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.mesh)


def run(config: DecoderStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains; the control is the same function with `is_vanilla`."""
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    corpus = coded_corpus.Corpus(config.layout(image_tokenizer.config.num_codes), image_tokenizer)
    source = config.world.scenes("train", *world_config.SEEN)
    documents: list[sequences.Example] = []
    neighbors = None
    if not config.is_vanilla:
        documents = corpus.memory(build_memory.open_memory(run))
        neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")
        if neighbors.shape[:2] != (len(source), config.captions_per_image + 1):
            raise UserError(
                f"decoder.captions_per_image is {config.captions_per_image}, but the neighbors were found "
                f"for {neighbors.shape[1] - 1} draws; give both stages the same."
            )
    watch = _make_watch(config, run, corpus, documents)
    # Training reads no row of a held-out class: these lie behind those of the seen ones.
    num_seen = len(build_memory.open_memory(run, build_memory.SEEN_VERSION)) if documents else 0
    row_source = make_rows(config, corpus, source, documents[:num_seen], neighbors)
    return fit(config, stage_dir, image_tokenizer, row_source, watch)


def make_rows(
    config: DecoderStageConfig,
    corpus: coded_corpus.Corpus,
    source: world_config.DocumentSource,
    memory: list[sequences.Example],
    neighbors: np.ndarray | None,
) -> RowSource:
    """Rows of all scenes of `source`, each with `captions_per_image` captions and a full one."""
    codes = corpus.codes(source)
    told = [
        [
            *(source.caption(i, draw) for draw in range(config.captions_per_image)),
            source.full_caption(i),
        ]
        for i in range(len(source))
    ]
    texts = [[corpus.example(text, codes[i]) for text in each] for i, each in enumerate(told)]
    words = corpus.image_tokenizer.vocabulary
    return RowSource(config, corpus.layout, words, texts, memory, neighbors)


def fit(
    config: DecoderStageConfig,
    stage_dir: epath.Path,
    image_tokenizer: frozen.FrozenTokenizer,
    row_source: RowSource,
    watch: copy_metrics.CopyWatch,
) -> dict:
    """Trains on rows and writes the model; the stage's metrics, in the first of several processes."""
    layout, mesh = row_source.layout, make_mesh(config)
    model_config = make_model_config(config, image_tokenizer, layout)
    make_model = partial(_make_model, model_config, config.seed)
    graphdef, _ = param_trees.describe(make_model, None)
    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make_model,
        partial(ra_cm3.loss_fn, config=model_config),
        row_source.batches(sharding.local_rows(config.batch_size, mesh)),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        watch=lambda step, params: watch(
            step, Generator(graphdef, params, image_tokenizer.vocabulary, layout)
        ),
    )
    checkpoint.save_params(stage_dir / "params", params)
    if not multiprocess.is_leader():
        return {}
    # What a loader needs to refuse another tokenizer's codes, and to lay out prompts as in training.
    record = {"tokenizer": image_tokenizer.fingerprint, "layout": dataclasses.asdict(layout)}
    model = dataclasses.asdict(model_config)
    files.write_json(stage_dir / "decoder.json", record | {"model": model})
    train = {k: v for k, v in log[-1].items() if k != "step"}
    cut = _share_cut(row_source.texts)
    return {"train": train, "tokens": row_source.num_tokens, "cut_texts": cut}


def _make_watch(
    config: DecoderStageConfig,
    run: run_folder.Run,
    corpus: coded_corpus.Corpus,
    documents: list[sequences.Example],
) -> copy_metrics.CopyWatch:
    """Unseen scenes with the best document that each retrieves."""
    source = config.world.scenes("test", *world_config.HELD_OUT)
    docs: list[list[sequences.Example]]
    if config.is_vanilla:
        chosen = world_config.sample_rows(source, config.num_watched, config.seed)
        docs = [[] for _ in chosen]
    else:
        folder = run.finished_stage("neighbors")
        chosen = files.read_array(folder / "held_out_rows.npy")
        found = files.read_array(folder / "held_out_text.npy")[:, :1]
        few = world_config.evenly_spaced(np.arange(len(chosen)), config.num_watched)
        chosen, docs = chosen[few], [coded_corpus.pick(documents, ids) for ids in found[few]]
    mains, art = corpus.test(source, chosen)
    return copy_metrics.CopyWatch(mains, docs, art, config.loop.num_steps)


def load_generator(
    run: run_folder.Run, stage: str, image_tokenizer: frozen.FrozenTokenizer
) -> Generator:
    """A trained decoder of a run (stage `decoder` or `control`), with prompts laid out as in training.

    Raises:
        UserError: the stage is missing, unfinished or edited, or was trained on another tokenizer's codes.
    """
    return load_params(run.finished_stage(stage), image_tokenizer)


def load_params(stage_dir: epath.Path, image_tokenizer: frozen.FrozenTokenizer) -> Generator:
    """What `fit` wrote; raises as `load_generator` does."""
    record = files.read_json(stage_dir / "decoder.json")
    if record["tokenizer"] != image_tokenizer.fingerprint:
        raise UserError(
            f"{stage_dir} was trained on codes of tokenizer {record['tokenizer'][:12]}, not of "
            f"{image_tokenizer.fingerprint[:12]}; use its own tokenizer."
        )
    model = dict(record["model"])
    try:
        model_config = ra_cm3.RACM3Config(DecoderConfig(**model.pop("decoder")), **model)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{stage_dir} holds a model of another version ({error}); train it anew."
        ) from None
    mounted = frozen.load_params(stage_dir / "params", partial(_make_model, model_config, 0))
    layout = sequences.Layout(**record["layout"])
    return Generator(mounted.graphdef, mounted.params, image_tokenizer.vocabulary, layout)


def make_model_config(
    config: DecoderStageConfig, image_tokenizer: frozen.FrozenTokenizer, layout: sequences.Layout
) -> ra_cm3.RACM3Config:
    """The model over a vocabulary rounded up, and over every position a row may use."""
    words = image_tokenizer.vocabulary
    vocab_size = -(-words.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    shape = DecoderConfig(
        vocab_size=vocab_size, max_seq_len=layout.num_positions, **dict(config.model)
    )
    return ra_cm3.RACM3Config(shape, words.code_offset, config.alpha)


def _make_model(config: ra_cm3.RACM3Config, seed: int) -> ra_cm3.Model:
    return ra_cm3.Model(config.decoder, rngs=nnx.Rngs(params=seed))


def _share_cut(texts: list[list[sequences.Example]]) -> float:
    return float(np.mean([example.num_cut > 0 for draws in texts for example in draws]))
