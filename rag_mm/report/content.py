"""The content of a report as plain arrays, strings and numbers.

The caller passes examples selected by a fixed rule, never by outcome; the page states the rule. Images are
uint8 [H, W, 3] RGB of any size.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VARIANTS = {
    "docs0": "no documents",
    "docs1": "1 document",
    "docs2": "2 documents",
    "control": "baseline",
    "hit_itself": "top hit, unchanged",
    "oracle_paste": "top hit, pasted in place",
    "random_documents": "random documents",
    "held_out_removed": "held-out removed",
    "oracle_documents": "oracle documents",
    "counterfactual_documents": "swapped images",
    "image_only_documents": "image-only documents",
    "text_only_documents": "text-only documents",
}
FACTS = {"entity": "entity", "place": "place", "color": "color"}


def variant_label(key: str) -> str:
    """Label of a variant's key in `metrics.json`; an unknown key is its own label."""
    return VARIANTS.get(key, key)


def fact_verdict(right: Mapping[str, bool]) -> str:
    """The scorer's verdict on one image: "✓ correct", "✗ wrong: entity, place" or "✗ all wrong"."""
    if right["joint"]:
        return "✓ correct"
    wrong = [label for fact, label in FACTS.items() if not right[fact]]
    return "✗ all wrong" if len(wrong) == len(FACTS) else "✗ wrong: " + ", ".join(wrong)


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """An image before and after the image tokenizer."""

    caption: str
    original: np.ndarray
    reconstruction: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Hit:
    """A retrieved document; `score` is the cosine similarity to the query."""

    caption: str
    image: np.ndarray
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """A text query and its hits, best first."""

    query: str
    hits: Sequence[Hit]


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One held-out test caption and the images generated for it.

    `drawn` maps each variant (a key of `VARIANTS`) to its image, in display order; `right` maps scored
    variants to {"entity", "place", "color", "joint"} -> bool, the scorer's results.
    """

    caption: str
    original: np.ndarray
    retrieved: Sequence[np.ndarray]
    drawn: Mapping[str, np.ndarray]
    right: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)

    def compared(self) -> list[tuple[str, str]]:
        """The variants of the overview, where generated: ("with retrieval" or "baseline", key).

        With retrieval means the decoder with the most documents.
        """
        with_docs = [key for key in self.drawn if re.fullmatch(r"docs\d+", key)]
        most_docs = max(with_docs, key=lambda key: int(key.removeprefix("docs")), default="")
        pairs = (("with retrieval", most_docs), ("baseline", "control"))
        return [(label, key) for label, key in pairs if key in self.drawn]


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionExample:
    """A test image, its reference caption, and the caption each variant generated."""

    image: np.ndarray
    truth: str
    written: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Band:
    """Range of the values of reference runs at each step; all four have the same length."""

    steps: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mean: Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One line of a training chart: `chart` is the chart's title, `label` the line's name.

    `band`, the range of healthy runs, is drawn behind the line.
    """

    chart: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    band: Band | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReportData:
    """Everything on the page. An empty part is omitted or marked as not measured.

    Attributes:
        metrics: content of metrics.json.
        config: the resolved config, JSON-ready.
        what_was_seen: the page's first sentence: whether the retriever has seen the held-out classes.
        setting: label and value, such as ("Classes never shown in training", "245").
        notes: caveats for the reader, such as a check that was switched off.
        story: examples of the overview at the top; `generations` shows them with every variant.
        choice: the sentence that states how they were selected.
        band_note: what the bands behind the training curves are.
    """

    title: str
    command: str
    seed: int
    version: str
    metrics: Mapping[str, Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    what_was_seen: str = ""
    setting: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    machine: str = ""
    stage_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    story: Sequence[Generation] = ()
    choice: str = ""
    reconstructions: Sequence[Reconstruction] = ()
    retrievals: Sequence[Retrieval] = ()
    generations: Sequence[Generation] = ()
    captions: Sequence[CaptionExample] = ()
    curves: Sequence[Curve] = ()
    band_note: str = ""
