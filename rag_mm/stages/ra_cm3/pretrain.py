"""Stage `pretraining`: trains a decoder, RA-CM3 or CM3Leon, on corpora that `rag-mm corpus build` made.

Documents are read from disk as text ids and codes (docs/corpus.md); the world's own are not used. Documents
of several texts or images are left out.
"""

import dataclasses
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_loader, held_out
from rag_mm.corpus.packing_plan import MixturePart
from rag_mm.data.sequences import Layout
from rag_mm.stages import multiprocess
from rag_mm.stages.ra_cm3 import (
    corpus_mixture,
    decoder_training,
    held_out_figures,
    null_prompts,
)
from rag_mm.stages.ra_cm3.corpus_mixture import PackedSequencesConfig
from rag_mm.stages.ra_cm3.drawn_sequences import SequenceDraws
from rag_mm.stages.shared import find_neighbors, train_tokenizer, world_config
from rag_mm.stages.stage import PER_DOCUMENT

INPUTS = ("tokenizer",)
SPLIT = "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingStageConfig(decoder_training.DecoderTrainingConfig):
    """Corpora, model and training of a decoder.

    Attributes:
        world: world of the run; of a world of corpora, `corpora` may be left out.
        corpora: the mixture: paths, or groups such as {"path": "corpus", "weight": 2.0, "neighbors": None}
            with the settings of `corpus_mixture.CorpusEntry`. Empty: the world's corpus.
        corpora_fingerprints: of the corpora and their neighbors. They are computed, so that other documents
            are another config.
        sequences: documents and lengths of sequences, packed into rows.
        num_held_out: number of documents that are never trained on, chosen by the hashes of their ids; they
            are measured at the end. 0 holds none out.
        num_watched: number of them that are measured at every checkpoint.
    """

    world: world_config.EmojiWorld | world_config.OwnImages | world_config.CorpusWorld
    sequences: PackedSequencesConfig
    corpora: tuple[Any, ...] = ()
    corpora_fingerprints: tuple[str, ...] = dataclasses.field(init=False, default=())
    num_held_out: int = 1024
    num_watched: int = 64

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(self, 0, "num_held_out", "num_watched")
        if self.num_held_out == 1:
            raise ValueError("num_held_out is 1; a standard error needs 2, and 0 holds none out")
        given = self.corpora
        if not given:
            if not isinstance(self.world, world_config.CorpusWorld):
                raise UserError("corpora is empty; name those to train on.")
            given = (self.world.corpus,)
        object.__setattr__(self, "corpora", corpus_mixture.read_entries(given))
        parts = self.open_parts()
        _ = self.layout(parts)
        object.__setattr__(self, "corpora_fingerprints", _fingerprints(parts))
        if self.num_held_out * 2 > sum(len(part.corpus) for part in parts):
            raise UserError(
                f"num_held_out is {self.num_held_out}, more than half of the corpora's documents; hold out "
                "fewer."
            )

    def open_parts(self) -> list[MixturePart]:
        """The corpora, opened; raises as `corpus_mixture.open_parts` does."""
        return corpus_mixture.open_parts(self.corpora, self.sequences, self.masking)

    def layout(self, parts: list[MixturePart]) -> Layout:
        """The layout of the sequences; raises as `corpus_mixture.make_layout` does."""
        return corpus_mixture.make_layout(parts, self.sequences, self.masking)


def run(
    config: PretrainingStageConfig, run: run_folder.Run, stage_dir: epath.Path
) -> dict[str, Any]:
    """Trains the decoder and measures it on the held-out documents.

    Returns:
        `train`, the last logged metrics; `documents` in the mixture; `left_out`, those with several texts or
        images; and `held_out` (`held_out_figures.summarize`), whose values by document are in
        per_document.json. {} in followers.

    Raises:
        UserError: a corpus holds codes of another image tokenizer than the run's, or has changed.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    parts = config.open_parts()
    parts[0].corpus.check_tokenizer(image_tokenizer.fingerprint)
    if _fingerprints(parts) != config.corpora_fingerprints:
        raise UserError("A corpus changed since the command began; run it again.")
    held = held_out.hold_out(parts, config.num_held_out)
    if held.num_unfit and multiprocess.is_leader():
        progress.say(
            f"{stage_dir.name}: {held.num_unfit:,} documents with several texts or images are left out"
        )
    layout = config.layout(parts)
    documents = held_out_figures.read(held, config.sequences.max_text_len, layout.max_docs)
    lacks_docs = any(part.neighbors is None for part in parts)
    fitted = decoder_training.fit(
        config,
        stage_dir,
        image_tokenizer,
        layout,
        make_batches(config, held.parts, layout),
        held_out_figures.HeldOutWatch(documents.first(config.num_watched)),
        null_prompts.shown(config.masking, config.sequences, lacks_docs),
    )
    values: dict[str, np.ndarray] = {}
    if documents.mains:
        code_probs = held_out_figures.count_codes(held.parts, config.seed)
        with jax.set_mesh(decoder_training.make_mesh(config)):
            values = held_out_figures.measure(fitted.generator, documents, code_probs)
    if not multiprocess.is_leader():
        return {}
    _write_policy(stage_dir, parts)
    result = {
        "train": fitted.train,
        "documents": sum(len(part.corpus) for part in parts),
        "left_out": held.num_unfit,
    }
    if not values:
        return result
    lists = {name: {held_out_figures.NLL: each.tolist()} for name, each in values.items()}
    files.write_json(stage_dir / PER_DOCUMENT, {SPLIT: lists})
    return {**result, SPLIT: held_out_figures.summarize(values)}


def make_batches(
    config: PretrainingStageConfig,
    parts: list[MixturePart],
    layout: Layout,
    rows: range | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of packed rows; see `corpus_loader.make_batches`.

    Args:
        config: rows, masking and noise.
        parts: the corpora, without what is held out.
        layout: of the sequences.
        rows: the part of each batch to make; None for those of this process on the config's mesh.
    """
    sequences = config.sequences
    vocabulary = parts[0].corpus.vocabulary
    draws = SequenceDraws(
        layout, vocabulary, config.masking, sequences.code_noise, sequences.image_first_prob
    )
    if rows is None:
        mesh = decoder_training.make_mesh(config)
        rows = sharding.local_rows(config.batch_size, mesh)
    return corpus_loader.make_batches(
        parts,
        sequences.rows(config.seed, config.masking),
        config.batch_size,
        draws.draw_all,
        padding={"tokens": vocabulary.pad, "targets": vocabulary.pad},
        rows=rows,
        num_workers=config.scale.num_workers,
    )


def _fingerprints(parts: list[MixturePart]) -> tuple[str, ...]:
    """Of each corpus, and of the memory of its neighbors, with how they were searched."""
    found = []
    for part in parts:
        found.append(part.corpus.fingerprint)
        if part.neighbors is not None:
            searched = part.neighbors.manifest
            settings = [searched.memory, dict(searched.settings)]
            found.append(files.digest(files.canonical_json(settings).encode()))
    return tuple(found)


def _write_policy(stage_dir: epath.Path, parts: list[MixturePart]) -> None:
    """The rules of retrieval at inference: those of the first neighbors."""
    found = [part.neighbors.manifest.settings for part in parts if part.neighbors is not None]
    settings = found[0] if found else {}
    names = ("max_similarity", "max_equal_codes")
    rules = {name: settings[name] for name in names if name in settings}
    files.write_json(stage_dir / find_neighbors.POLICY, rules)
