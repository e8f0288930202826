"""Stage `copy_probe`: tests within minutes whether a decoder learns to copy from documents.

There is no retriever and no memory: documents are random other scenes of the same class. A decoder that does
not learn to copy from these does not learn it from retrieved documents either.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from rag_mm.core import checks, files, run_folder
from rag_mm.data import token_documents
from rag_mm.eval import likelihood, scene_accuracy, statistics
from rag_mm.stages import multiprocess
from rag_mm.stages.ra_cm3 import copy_metrics, train_decoder
from rag_mm.stages.shared import coded_corpus, train_tokenizer, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("tokenizer",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyProbeStageConfig(train_decoder.DecoderStageConfig):
    """A decoder's config, and how the probe measures it.

    Attributes:
        min_gain: the stage stops at half of the steps if documents raise the top-1 share of art codes of
            tune classes by less than this; 0 disables the check.
        num_test: number of test scenes of test classes measured at the end.
    """

    world: world_config.EmojiWorld
    min_gain: float = 0.0
    num_test: int = 256

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(self, 2, "num_test")


def run(config: CopyProbeStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains, then measures on unseen classes; writes `per_document.json` as `evaluation` does.

    Returns:
        The decoder's metrics, and `art_nll` and `art_top1` for 0 to `max_docs` documents; {} in followers.

    Raises:
        UserError: the gain by documents is below `min_gain` at half of the steps.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    corpus = coded_corpus.Corpus(
        config.layout(coded_corpus.image_len(image_tokenizer)), image_tokenizer
    )
    seen, held_out = (
        _documents(corpus, config.world.scenes("memory", *splits))
        for splits in (world_config.SEEN, world_config.HELD_OUT)
    )
    source = config.world.scenes("train", *world_config.SEEN)
    num_queries = config.sequences.captions_per_image + 1
    neighbors = _sample_neighbors(config, source.class_ids, seen, num_queries)
    training_source = train_decoder.make_sequences(config, corpus, source, seen.examples, neighbors)
    mains, docs, art = _draw_tests(config, corpus, held_out, world_config.TUNE, config.num_watched)
    first_docs = [documents[:1] for documents in docs]
    watch = copy_metrics.CopyWatch(mains, first_docs, art, config.loop.num_steps, config.min_gain)
    metrics = train_decoder.fit(config, stage_dir, image_tokenizer, training_source, watch)
    if not multiprocess.is_leader():
        return {}
    generator = train_decoder.load_params(stage_dir, image_tokenizer)
    mains, docs, art = _draw_tests(config, corpus, held_out, world_config.TEST, config.num_test)
    values = {}
    for count in range(config.sequences.max_docs + 1):
        first_docs = [documents[:count] for documents in docs]
        nll, is_top1 = likelihood.score_codes(generator, mains, first_docs)
        values[f"docs{count}"] = {
            "art_nll": scene_accuracy.per_document(nll, art),
            "art_top1": scene_accuracy.per_document(is_top1, art),
        }
    lists = {name: {k: v.tolist() for k, v in part.items()} for name, part in values.items()}
    files.write_json(stage_dir / PER_DOCUMENT, {"held_out": lists})
    figures = {
        figure: {name: statistics.mean(part[figure]) for name, part in values.items()}
        for figure in ("art_nll", "art_top1")
    }
    return metrics | figures


@dataclasses.dataclass(frozen=True, eq=False)
class _Documents:
    """Documents as examples, and the class of each, int [R]."""

    examples: list[token_documents.Example]
    class_ids: np.ndarray


def _documents(corpus: coded_corpus.Corpus, source: emoji_scenes.Scenes) -> _Documents:
    codes = corpus.codes(source)
    examples = [corpus.example(source.caption(i, 0), codes[i]) for i in range(len(source))]
    return _Documents(examples, source.class_ids)


def _draw_tests(
    config: CopyProbeStageConfig,
    corpus: coded_corpus.Corpus,
    documents: _Documents,
    splits: Sequence[str],
    count: int,
) -> tuple[list[token_documents.Example], list[list[token_documents.Example]], np.ndarray]:
    """At most `count` test scenes, `max_docs` documents of the class of each, and their art codes."""
    source = config.world.scenes("test", *splits)
    rows = world_config.sample_rows(source, count, config.seed)
    mains, art = corpus.test(source, rows)
    neighbors = _sample_neighbors(config, source.class_ids[rows], documents, 1)[:, 0]
    return mains, [[documents.examples[i] for i in ids] for ids in neighbors], art


def _sample_neighbors(
    config: CopyProbeStageConfig, class_ids: np.ndarray, documents: _Documents, num_queries: int
) -> np.ndarray:
    """Rows of `documents` of each class, int32 [Q, num_queries, max_docs], distinct in the last axis."""
    rng = np.random.default_rng((config.seed, 6))
    rows_of = {c: np.flatnonzero(documents.class_ids == c) for c in np.unique(class_ids)}
    neighbors = [
        [rng.permutation(rows_of[c])[: config.sequences.max_docs] for _ in range(num_queries)]
        for c in class_ids
    ]
    return np.array(neighbors, np.int32)
