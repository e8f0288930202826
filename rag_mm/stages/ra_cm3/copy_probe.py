"""Stage `copy_probe`: does a decoder learn to copy, when every document it reads is the right one?

No retriever and no memory: documents are other scenes of the same class, drawn by lot. What cannot be learned
here cannot be learned behind a retriever, and here it takes minutes to know.
"""

import dataclasses

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.data import sequences
from rag_mm.eval import likelihood, scene_accuracy, statistics
from rag_mm.stages import multiprocess
from rag_mm.stages.ra_cm3 import copy_metrics, train_decoder
from rag_mm.stages.shared import coded_corpus, train_tokenizer, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("tokenizer",)


@dataclasses.dataclass(frozen=True)
class CopyProbeStageConfig(train_decoder.DecoderStageConfig):
    """A decoder's config.

    Attributes:
        min_gain: how much a document must add to the top-1 share of unseen art by half time, or
            the stage ends there; 0 lets every run go on.
        num_test: unseen scenes measured at the end.
    """

    world: world_config.EmojiWorld
    min_gain: float = 0.0
    num_test: int = 256


def run(config: CopyProbeStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains, then measures on unseen classes; writes `per_document.json` as `evaluation` does."""
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    corpus = coded_corpus.Corpus(config.layout(image_tokenizer.config.num_codes), image_tokenizer)
    seen, held_out = (
        _documents(corpus, config.world.scenes("memory", *splits))
        for splits in (world_config.SEEN, world_config.HELD_OUT)
    )
    source = config.world.scenes("train", *world_config.SEEN)
    neighbors = _draw(config, source.class_ids, seen, config.sequences.captions_per_image + 1)
    training_source = train_decoder.make_sequences(config, corpus, source, seen.examples, neighbors)
    tests = config.world.scenes("test", *world_config.HELD_OUT)
    chosen = world_config.sample_rows(tests, config.num_test, config.seed)
    mains, art = corpus.test(tests, chosen)
    found = _draw(config, tests.class_ids[chosen], held_out, 1)[:, 0]
    docs = [[held_out.examples[i] for i in ids] for ids in found]
    few = world_config.evenly_spaced(np.arange(len(mains)), config.num_watched)
    watch = copy_metrics.CopyWatch(
        [mains[i] for i in few],
        [docs[i][:1] for i in few],
        art[few],
        config.loop.num_steps,
        config.min_gain,
    )
    metrics = train_decoder.fit(config, stage_dir, image_tokenizer, training_source, watch)
    if not multiprocess.is_leader():
        return {}
    generator = train_decoder.load_params(stage_dir, image_tokenizer)
    values = {}
    for count in range(config.sequences.max_docs + 1):
        given = [some[:count] for some in docs]
        nll, is_top1 = likelihood.score_codes(generator, mains, given)
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
    """Examples, and the class of each."""

    examples: list[sequences.Example]
    class_ids: np.ndarray


def _documents(corpus: coded_corpus.Corpus, source: emoji_scenes.Scenes) -> _Documents:
    codes = corpus.codes(source)
    made = [corpus.example(source.caption(i, 0), codes[i]) for i in range(len(source))]
    return _Documents(made, source.class_ids)


def _draw(
    config: CopyProbeStageConfig, class_ids: np.ndarray, documents: _Documents, num_draws: int
) -> np.ndarray:
    """Rows of `documents` that show each class, int32 [Q, num_draws, max_docs], without repeats in a draw."""
    rng = np.random.default_rng((config.seed, 6))
    rows_of = {c: np.flatnonzero(documents.class_ids == c) for c in np.unique(class_ids)}
    draws = [
        [rng.permutation(rows_of[c])[: config.sequences.max_docs] for _ in range(num_draws)]
        for c in class_ids
    ]
    return np.array(draws, np.int32)
