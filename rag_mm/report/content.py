"""What a report shows, as plain things: arrays, strings and numbers (design section 9).

The caller hands over the first documents of each kind, not chosen ones: the page says so.
Pictures are uint8 [H, W, 3] RGB of any size.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VARIANTS = {
    "docs0": "no document",
    "docs1": "1 document",
    "docs2": "2 documents",
    "control": "vanilla",
    "hit_itself": "the hit itself",
    "random_documents": "random documents",
}


def variant_label(key: str) -> str:
    """Plain words for a variant's key in `metrics.json`; an unknown key is its own label."""
    return VARIANTS.get(key, key)


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


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenCaption:
    """A test picture, its true caption, and what each variant wrote."""

    image: np.ndarray
    truth: str
    written: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One line of a training chart: `chart` is the chart's title, `label` the line's name."""

    chart: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class ReportData:
    """Everything on the page. An empty part is left out or said to be missing.

    `metrics` is the content of metrics.json; `config` the resolved config, JSON-ready;
    `setting` pairs of words such as ("Classes never shown in training", "245");
    `notes` sentences a reader must know, such as a gate that was switched off.
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
    reconstructions: Sequence[Reconstruction] = ()
    retrievals: Sequence[Retrieval] = ()
    generations: Sequence[Generation] = ()
    captions: Sequence[WrittenCaption] = ()
    curves: Sequence[Curve] = ()
