"""Metrics of RECO's fusion: accuracy by split under every condition, retrieval, and entities by question.

The figures of interest are those of held-out classes: on classes seen in training, any trained head memorizes
the mapping, whatever it retrieves (docs/papers/reco.md).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from rag_mm.eval import statistics, zeroshot
from rag_mm.models import reco
from rag_mm.stages.reco import embed_pairs
from rag_mm.stages.reco.refinement import (
    Bank,
    Fuse,
    Refiner,
    SearchSettings,
    fuse,
    learned_fusions,
    mean_fusions,
)
from rag_mm.stages.shared import frozen


@dataclasses.dataclass(frozen=True)
class MeasuresConfig:
    """What is measured after training.

    Attributes:
        curve_neighbors: further numbers of neighbors to measure accuracy with.
        curve_rows: further numbers of memory rows per class to measure accuracy with.
        question_weight: weight of a question's embedding when it is added to that of its image.
    """

    curve_neighbors: tuple[int, ...] = (1, 2, 5, 20)
    curve_rows: tuple[int, ...] = (1, 5, 10)
    question_weight: float = 1.0

    def __post_init__(self):
        if min((1, *self.curve_neighbors, *self.curve_rows)) < 1:
            raise ValueError("curve_neighbors and curve_rows must be at least 1 each")


# {split or task: {condition: bool [Q], whether each query is answered correctly}}
Values = dict[str, dict[str, np.ndarray]]


class FusionEvaluation:
    """Measures a trained fusion under the conditions of `docs/papers/reco.md`, query by query."""

    def __init__(
        self,
        measures: MeasuresConfig,
        search: SearchSettings,
        seed: int,
        pairs: embed_pairs.EmbeddedPairs,
        model: frozen.LoadedModel,
        make_model: Callable[[], reco.RECO],
    ):
        """Takes the trained fusion as `model`; `make_model` makes an untrained one."""
        self._measures, self._search, self._seed = measures, search, seed
        self._pairs, self._make_model = pairs, make_model
        self._fusions = learned_fusions(model)
        self._names = zeroshot.ensemble(pairs.prompts)
        self._bank = Bank.of_pairs(pairs.memory)

    def all(self) -> Values:
        """Accuracy by split and, if the pairs have them, retrieval and questions; see `Values`."""
        values: Values = {name: {} for name in self._pairs.split_names}
        split_of_test = self._pairs.splits[self._pairs.test.class_ids]
        for condition, hits in self._conditions().items():
            for number, name in enumerate(self._pairs.split_names):
                values[name][condition] = hits[split_of_test == number]
        return values | self._retrieval() | self._answers()

    def _conditions(self) -> dict[str, np.ndarray]:
        search, pairs = self._search, self._pairs
        image, text = pairs.test.image, self._names
        whole = self._refine(self._fusions, self._bank, search)
        hits = {
            "frozen": self._hits(image, text),
            "both": self._hits(*whole),
            "image": self._hits(whole[0], text),
            "text": self._hits(image, whole[1]),
        }
        graphdef, params = nnx.split(self._make_model(), nnx.Param)
        untrained = frozen.LoadedModel(graphdef, nnx.to_pure_dict(params))
        others: dict[str, tuple[Mapping[str, Fuse], Bank, SearchSettings]] = {
            "step 0": (learned_fusions(untrained), self._bank, search),
            "mean": (mean_fusions(), self._bank, search),
        }
        for name, bank in self._banks().items():
            others[name] = (self._fusions, bank, search)
        for k in self._measures.curve_neighbors:
            fewer = dataclasses.replace(search, num_neighbors=k)
            others[f"k{k}"] = (self._fusions, self._bank, fewer)
        for override in ("query", "random"):
            overridden = dataclasses.replace(search, retrieval_override=override)
            others[f"{override} at test"] = (self._fusions, self._bank, overridden)
        return hits | {
            name: self._hits(*self._refine(*setting)) for name, setting in others.items()
        }

    def _banks(self) -> dict[str, Bank]:
        """Other memories, by the name of their condition."""
        pairs, rng = self._pairs, np.random.default_rng((self._seed, 8))
        memory, seen = pairs.memory, pairs.seen_memory
        shuffled = memory.text[rng.permutation(len(memory))]
        banks = {
            "rows removed": Bank.of_pairs(seen),
            "rows back": Bank.of_pairs(seen + memory.take(np.arange(pairs.num_seen, len(memory)))),
            "texts shuffled": Bank({"image": memory.image, "text": shuffled}),
        }
        rank = _rank_in_class(memory.class_ids)
        for count in self._measures.curve_rows:
            banks[f"rows{count}"] = Bank.of_pairs(memory.take(rank < count))
        return banks

    def _refine(
        self, fusions: Mapping[str, Fuse], bank: Bank, search: SearchSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        refiner = Refiner(fusions, bank, search)
        return refiner.refine("image", self._pairs.test.image), refiner.refine("text", self._names)

    def _hits(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return zeroshot.hits_at_1(images, classes, self._pairs.test.class_ids)

    def _retrieval(self) -> Values:
        """Recall@k of images by captions, and of captions by images."""
        captioned, keys = self._pairs.captioned, self._pairs.caption_keys
        if not len(captioned):
            return {}
        is_match = keys[:, None] == keys[None, :]
        refiner = Refiner(self._fusions, self._bank, self._search)
        sides = {"frozen": (captioned.image, captioned.text)}
        sides["both"] = (
            refiner.refine("image", captioned.image),
            refiner.refine("text", captioned.text),
        )
        values: Values = {"text_to_image": {}, "image_to_text": {}}
        for name, (image, text) in sides.items():
            for direction, similarities in (
                ("text_to_image", text @ image.T),
                ("image_to_text", image @ text.T),
            ):
                for k, hits in zeroshot.recall_at_k(similarities, is_match).items():
                    values[direction][f"{name} at {k}"] = hits
        return values

    def _answers(self) -> Values:
        """Accuracy of entities, asked for by a question about a part of an image, as in OVEN."""
        questions = self._pairs.questions
        if not len(questions):
            return {}
        joined = questions.image + self._measures.question_weight * questions.text
        joined = (joined / np.linalg.norm(joined, axis=1, keepdims=True)).astype(np.float32)
        search = self._search
        refiner = Refiner(self._fusions, self._bank, search)
        refined = fuse(
            self._fusions["image"],
            joined,
            # Retrieval uses the image only, since a question is unlike any image in the memory.
            search.find(self._bank, "image", questions.image),
        )
        names = refiner.refine("text", self._names)
        hits = {
            "frozen": zeroshot.hits_at_1(joined, self._names, questions.class_ids),
            "both": zeroshot.hits_at_1(refined, names, questions.class_ids),
        }
        split = self._pairs.splits[questions.class_ids]
        return {
            f"entities_{name}": {key: values[split == i] for key, values in hits.items()}
            for i, name in enumerate(self._pairs.split_names)
        }


def _rank_in_class(class_ids: np.ndarray) -> np.ndarray:
    """The number of earlier rows of the same class, for each row: int64 [N]."""
    order = np.argsort(class_ids, kind="stable")
    ranked = class_ids[order]
    starts = np.searchsorted(ranked, ranked)
    rank = np.empty(len(class_ids), np.int64)
    rank[order] = np.arange(len(class_ids)) - starts
    return rank


def to_lists(values: Values) -> dict[str, dict[str, list[float]]]:
    """The values as lists of 0.0 and 1.0, for JSON."""
    return {
        name: {key: hits.astype(float).tolist() for key, hits in part.items()}
        for name, part in values.items()
    }


def summarize(values: Values) -> dict[str, Any]:
    """Accuracies with intervals and, for questions, OVEN's harmonic mean of seen and unseen classes."""
    figures: dict[str, Any] = {
        name: {key: statistics.accuracy(hits) for key, hits in part.items()}
        for name, part in values.items()
        if all(len(hits) for hits in part.values())
    }
    if "entities_held_out" in figures and "entities_common" in figures:
        figures["entities_harmonic_mean"] = {
            key: zeroshot.harmonic_mean(
                figures["entities_common"][key]["accuracy"],
                figures["entities_held_out"][key]["accuracy"],
            )
            for key in ("frozen", "both")
        }
    return figures
