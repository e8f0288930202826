"""What a report shows, as plain things: arrays, strings and numbers (design section 9).

The caller hands over documents chosen by a rule and never by outcome: the page says which.
Pictures are uint8 [H, W, 3] RGB of any size.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VARIANTS = {
    "docs0": "no document",
    "docs1": "1 document",
    "docs2": "2 documents",
    "control": "vanilla",
    "hit_itself": "the hit itself",
    "oracle_paste": "the hit's art, pasted",
    "random_documents": "random documents",
    "held_out_removed": "held-out rows removed",
    "oracle_documents": "documents of the right entity",
    "counterfactual_documents": "pictures of another entity",
    "image_only_documents": "documents without text",
    "text_only_documents": "documents without pictures",
}
FACTS = {"entity": "entity", "place": "place", "color": "colour"}


def variant_label(key: str) -> str:
    """Plain words for a variant's key in `metrics.json`; an unknown key is its own label."""
    return VARIANTS.get(key, key)


def fact_verdict(right: Mapping[str, bool]) -> str:
    """What the scorer found in one picture: "✓ right", "✗ wrong: entity, place" or "✗ all wrong"."""
    if right["joint"]:
        return "✓ right"
    wrong = [word for fact, word in FACTS.items() if not right[fact]]
    return "✗ all wrong" if len(wrong) == len(FACTS) else "✗ wrong: " + ", ".join(wrong)


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """A picture before and after the image tokenizer."""

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
    """One held-out test caption and everything that was drawn for it.

    `drawn` maps a variant (a key of `VARIANTS`) to its picture, in the order to show;
    `right` maps the same keys to {"entity", "place", "color", "joint"} -> bool as the scorer
    found, where it was asked.
    """

    caption: str
    original: np.ndarray
    retrieved: Sequence[np.ndarray]
    drawn: Mapping[str, np.ndarray]
    right: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)

    def compared(self) -> list[tuple[str, str]]:
        """What the story sets side by side: ("ours" or "vanilla", variant), where they were drawn.

        Ours is the decoder with the most documents.
        """
        ours = [key for key in self.drawn if re.fullmatch(r"docs\d+", key)]
        most = max(ours, key=lambda key: int(key.removeprefix("docs")), default="")
        pairs = (("ours", most), ("vanilla", "control"))
        return [(label, key) for label, key in pairs if key in self.drawn]


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionExample:
    """A test picture, its true caption, and what each variant wrote."""

    image: np.ndarray
    truth: str
    written: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Band:
    """The range in which other runs' values lay at each step; all four are equally long."""

    steps: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mean: Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One line of a training chart: `chart` is the chart's title, `label` the line's name.

    `band` is drawn behind the line: where healthy runs lie.
    """

    chart: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    band: Band | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReportData:
    """Everything on the page. An empty part is left out or said to be missing.

    `metrics` is the content of metrics.json; `config` the resolved config, JSON-ready;
    `setting` pairs of words such as ("Classes never shown in training", "245");
    `notes` sentences a reader must know, such as a gate that was switched off.
    `story` are the rows of the first screen, which `generations` shows with every variant;
    `choice` is the sentence that says how they were chosen; `band_note` says what the charts'
    bands are.
    """

    title: str
    command: str
    seed: int
    version: str
    metrics: Mapping[str, Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
