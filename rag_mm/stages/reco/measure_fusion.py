"""What RECO's fusion is measured by: accuracy by split under every condition, retrieval, and entities.

Figures of interest are those of classes never trained on: on classes that were, any trained head memorizes
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
        curve_neighbors: further numbers of neighbors to measure with.
        curve_rows: further numbers of memory rows of each class to measure with.
        question_weight: weight of a question's embedding when added to its image's.
    """

    curve_neighbors: tuple[int, ...] = (1, 2, 5, 20)
    curve_rows: tuple[int, ...] = (1, 5, 10)
    question_weight: float = 1.0

    def __post_init__(self):
        if min((1, *self.curve_neighbors, *self.curve_rows)) < 1:
            raise ValueError("curve_neighbors and curve_rows are at least 1 each")


Values = dict[str, dict[str, np.ndarray]]


class FusionEvaluation:
    """Accuracy under every condition of `docs/papers/reco.md`, image by image."""

    def __init__(
        self,
        measures: MeasuresConfig,
        search: SearchSettings,
        seed: int,
        found: embed_pairs.EmbeddedPairs,
        mounted: frozen.LoadedModel,
        make_model: Callable[[], reco.RECO],
    ):
        """`mounted` is the trained fusion; `make_model` makes a fresh one."""
        self._measures, self._search, self._seed = measures, search, seed
        self._found, self._make_model = found, make_model
        self._fusions = learned_fusions(mounted)
        self._names = zeroshot.ensemble(found.prompts)
        self._bank = Bank.of_pairs(found.memory)

    def all(self) -> Values:
        """{split: {condition: bool [Q]}}, and retrieval and questions where there are any."""
        values: Values = {name: {} for name in self._found.split_names}
        split_of_test = self._found.splits[self._found.test.class_ids]
        for condition, hits in self._conditions().items():
            for number, name in enumerate(self._found.split_names):
                values[name][condition] = hits[split_of_test == number]
        return values | self._retrieval() | self._answers()

    def _conditions(self) -> dict[str, np.ndarray]:
        search, found = self._search, self._found
        image, text = found.test.image, self._names
        whole = self._refine(self._fusions, self._bank, search)
        hits = {
            "frozen": self._hits(image, text),
            "both": self._hits(*whole),
            "image": self._hits(whole[0], text),
            "text": self._hits(image, whole[1]),
        }
        fresh = nnx.split(self._make_model(), nnx.Param)
        untrained = frozen.LoadedModel(fresh[0], nnx.to_pure_dict(fresh[1]))
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
        return hits | {name: self._hits(*self._refine(*how)) for name, how in others.items()}

    def _banks(self) -> dict[str, Bank]:
        """Memories to be exchanged for the whole one."""
        found, rng = self._found, np.random.default_rng((self._seed, 8))
        memory, seen = found.memory, found.seen_memory
        shuffled = memory.text[rng.permutation(len(memory))]
        banks = {
            "rows removed": Bank.of_pairs(seen),
            "rows back": Bank.of_pairs(seen + memory.take(np.arange(found.num_seen, len(memory)))),
            "texts shuffled": Bank({"image": memory.image, "text": shuffled}),
        }
        place = _place_in_class(memory.class_ids)
        for count in self._measures.curve_rows:
            banks[f"rows{count}"] = Bank.of_pairs(memory.take(place < count))
        return banks

    def _refine(
        self, fusions: Mapping[str, Fuse], bank: Bank, search: SearchSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        refiner = Refiner(fusions, bank, search)
        return refiner.refine("image", self._found.test.image), refiner.refine("text", self._names)

    def _hits(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return zeroshot.hits_at_1(images, classes, self._found.test.class_ids)

    def _retrieval(self) -> Values:
        """Recall of pictures by captions and of captions by pictures."""
        captioned, keys = self._found.captioned, self._found.caption_keys
        if not len(captioned):
            return {}
        wanted = keys[:, None] == keys[None, :]
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
                for k, hits in zeroshot.recall_at_k(similarities, wanted).items():
                    values[direction][f"{name} at {k}"] = hits
        return values

    def _answers(self) -> Values:
        """Entities asked for by a question about a part of a picture (OVEN)."""
        questions = self._found.questions
        if not len(questions):
            return {}
        joined = questions.image + self._measures.question_weight * questions.text
        joined = (joined / np.linalg.norm(joined, axis=1, keepdims=True)).astype(np.float32)
        search = self._search
        refiner = Refiner(self._fusions, self._bank, search)
        refined = fuse(
            self._fusions["image"],
            joined,
            # The picture alone is looked up: a question is like no picture in the memory.
            search.find(self._bank, "image", questions.image),
        )
        names = refiner.refine("text", self._names)
        hits = {
            "frozen": zeroshot.hits_at_1(joined, self._names, questions.class_ids),
            "both": zeroshot.hits_at_1(refined, names, questions.class_ids),
        }
        of_split = self._found.splits[questions.class_ids]
        return {
            f"entities_{name}": {key: right[of_split == i] for key, right in hits.items()}
            for i, name in enumerate(self._found.split_names)
        }


def _place_in_class(class_ids: np.ndarray) -> np.ndarray:
    """How many rows of its class stand before each: int64 [N]."""
    order = np.argsort(class_ids, kind="stable")
    ranked = class_ids[order]
    starts = np.searchsorted(ranked, ranked)
    place = np.empty(len(class_ids), np.int64)
    place[order] = np.arange(len(class_ids)) - starts
    return place


def to_lists(values: Values) -> dict[str, dict[str, list[float]]]:
    """The values as JSON holds them."""
    return {
        name: {key: hits.astype(float).tolist() for key, hits in part.items()}
        for name, part in values.items()
    }


def summarize(values: Values) -> dict[str, Any]:
    """Accuracies, and OVEN's harmonic mean of seen and unseen where entities were asked for."""
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
