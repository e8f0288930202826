"""Pictures of the page about decoding: the sweep, one scene at several weights, candidates with scores."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.report import decoding_figure
from rag_mm.report.content import fact_verdict
from rag_mm.report.decoding_page import Frame, PageSection, Strip
from rag_mm.stages.cm3leon import (
    decoding_settings,
    decoding_tables,
    measure_decoding,
    rank_candidates,
)
from rag_mm.stages.cm3leon.decoding_scenes import DecodingScenes
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig
from rag_mm.stages.shared import world_config

_SHOWN = 8  # Candidates of a scene.
_FACTS = ("entity", "place", "color", "joint")


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingPictures:
    """Draws from the files of a finished stage."""

    config: DecodingStageConfig
    scenes: DecodingScenes
    stage_dir: epath.Path

    def sweep(self, metrics: Mapping[str, Any]) -> PageSection:
        """The sweep as grids and curves, and the first example at every weight."""
        text = (
            "Joint accuracy by guidance weight and temperature, a column per null prompt. Weight 1, framed, "
            "is plain sampling; weight 0 samples from the null prompt. Below, one scene at temperature "
            "1: its documents, the scene that the caption describes, and what each weight draws from the "
            "same seed."
        )
        grids = [self._grid(null, metrics) for null in self.config.nulls]
        picture = decoding_figure.sweep_png(grids), "Joint accuracy by weight and temperature"
        examples = self._examples()[:1]
        strips = [
            Strip(
                f"{self.scenes.captions[i]}: {decoding_tables.READS[null]}",
                list(self._weights(i, null)),
            )
            for i in examples
            for null in self.config.nulls
        ]
        return PageSection("Guidance", text, picture, strips)

    def ranking(self, metrics: Mapping[str, Any]) -> PageSection:
        """Re-ranking as a table, and the candidates of the examples."""
        text = (
            "The retriever scores candidates by the cosine of image and caption, and the best is kept "
            "(framed in the pictures, which show the first candidates of plain sampling at temperature 1)."
        )
        strips = [
            Strip(self.scenes.captions[i], list(self._candidates(i))) for i in self._examples()
        ]
        table = decoding_tables.ranking_table(self.config, metrics)
        return PageSection("Re-ranking", text, strips=strips, tables=[table])

    def _examples(self) -> list[int]:
        """Scenes that are shown, evenly spaced, whatever was drawn for them."""
        scenes = np.arange(len(self.scenes.facts))
        return [int(i) for i in world_config.evenly_spaced(scenes, self.config.num_examples)]

    def _grid(self, null: str, metrics: Mapping[str, Any]) -> decoding_figure.SweepGrid:
        weights, temperatures = self.config.weights, self.config.temperatures
        found = [
            [
                metrics["settings"][decoding_settings.guided(null, weight, each).name]["joint"]
                for weight in weights
            ]
            for each in temperatures
        ]
        joint, error = (
            np.array([[cell[key] for cell in row] for row in found])
            for key in ("accuracy", "standard_error")
        )
        title = decoding_tables.READS[null]
        return decoding_figure.SweepGrid(title, temperatures, weights, joint, error)

    def _image(self, codes: np.ndarray) -> np.ndarray:
        return self.scenes.image_tokenizer.decode(codes[None])[0]

    def _verdict(self, name: str, scene: int) -> str:
        values = measure_decoding.read_values(self.stage_dir, name)
        return fact_verdict({fact: bool(values[fact][scene]) for fact in _FACTS})

    def _weights(self, scene: int, null: str) -> Iterator[Frame]:
        for number, doc in enumerate(self.scenes.docs[scene], start=1):
            yield Frame(self._image(doc.codes), [f"document {number}"])
        yield Frame(self.scenes.images[scene], ["the scene"])
        for weight in self.config.weights:
            name = decoding_settings.guided(null, weight, 1.0).name
            codes = measure_decoding.read_codes(self.stage_dir, name)[scene]
            yield Frame(self._image(codes), [f"weight {weight:g}", self._verdict(name, scene)])

    def _candidates(self, scene: int) -> Iterator[Frame]:
        made = decoding_settings.candidates(self.config)["plain"][:_SHOWN]
        scores = [
            measure_decoding.read_values(self.stage_dir, setting.name)["similarity"][scene]
            for setting in made
        ]
        best = rank_candidates.kept(np.array(scores)[:, None])[0]
        for number, (setting, score) in enumerate(zip(made, scores, strict=True)):
            codes = measure_decoding.read_codes(self.stage_dir, setting.name)[scene]
            lines = [f"cosine {score:.3f}", self._verdict(setting.name, scene)]
            yield Frame(self._image(codes), lines, is_kept=number == best)
