"""The requests that the page of `rag-mm explore` makes of a run: fields and images in, JSON values out."""

import dataclasses
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from rag_mm.api import steering_options
from rag_mm.api.instructions import SILHOUETTE
from rag_mm.api.session import Session
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import named_boxes
from rag_mm.decode import guidance, tasks
from rag_mm.memory import hits, model_protocols

MAX_HITS = 60
MAX_SEED = (1 << 31) - 1
MAX_CANDIDATES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Explorer:
    """The requests that the page makes.

    Each method takes the request's fields, whose values are texts where an image was sent, and its images
    uint8 [H, W, 3], and returns JSON values.
    """

    session: Session
    name: str

    def search(self, fields: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Hits in `view` for a text, for the document with id `document`, or for an image."""
        view = _text(fields, "view", "image" if images else "mixed")
        model_protocols.check_view(view)
        k = _integer(fields, "k", 12, 1, MAX_HITS)
        memory = self.session.memory
        if images:
            results = memory.search(image=images[0], view=view, k=k)
        elif "document" in fields:
            document_id = _text(fields, "document")
            if document_id not in memory.ids:
                raise UserError(f"The memory has no document with the id {document_id!r}.")
            vector = memory.embeddings(view)[memory.ids.index(document_id)]
            results = memory.search(vectors=vector[None], view=view, k=k)
        else:
            text = _text(fields, "text")
            if not text.strip():
                raise UserError("The text is empty; enter a query.")
            results = memory.search(text=text, view=view, k=k)
        return {"view": view, "hits": hits.describe(memory, results)}

    def generate(self, fields: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Generates an image of `text`, given `docs` retrieved documents, the best of `best_of` candidates.

        An image is a structure of the feature `feature`; `boxes` are JSON as `named_boxes.parse` reads.
        Fields of guidance and contrast are those of `steering_options`.
        """
        boxes = _text(fields, "boxes", "")
        generated = self.session.generate(
            _text(fields, "text"),
            boxes=named_boxes.parse(boxes, "The field boxes") if boxes.strip() else (),
            structure=images[0] if images else None,
            feature=_text(fields, "feature", SILHOUETTE),
            docs=self._docs(fields),
            seed=_integer(fields, "seed", 0, 0, MAX_SEED),
            best_of=_integer(fields, "best_of", 1, 1, MAX_CANDIDATES),
            decoding=_text(fields, "decoding", tasks.SEQUENTIAL),
            **steering_options.parse(_as_numbers(fields)),
        )
        answer = {"image": hits.data_url(generated.images[0]), "neighbors": generated.neighbors}
        if generated.candidates is None or generated.scores is None:
            return answer
        pairs = zip(generated.candidates[0], generated.scores[0].tolist(), strict=True)
        candidates = [{"image": hits.data_url(image), "score": score} for image, score in pairs]
        return answer | {"candidates": candidates}

    def caption(self, fields: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Captions an image, given `docs` retrieved documents."""
        if not images:
            raise UserError("The request has no image to caption.")
        generated = self.session.caption(images[0], docs=self._docs(fields))
        return {"text": generated.captions[0], "neighbors": generated.neighbors}

    def edit(self, fields: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Edits an image, the second beside it if there are two, as `text` says; `num` results."""
        if not images:
            raise UserError("The request has no image to edit.")
        edited = self.session.edit(
            images[0],
            _text(fields, "text"),
            second=images[1] if len(images) > 1 else None,
            num=_integer(fields, "num", 1, 1, MAX_CANDIDATES),
            seed=_integer(fields, "seed", 0, 0, MAX_SEED),
            guidance=_float(fields, "guidance", 1.0),
            image_guidance=_float(fields, "image_guidance", 1.0),
        )
        drawn = [hits.data_url(image) for image in edited.images]
        return {"images": drawn, "neighbors": edited.neighbors}

    def ask(self, fields: dict[str, Any], images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Answers the question `text` about an image, given `docs` retrieved documents."""
        if not images:
            raise UserError("The request has no image to ask about.")
        found = self.session.ask(images[0], _text(fields, "text"), docs=self._docs(fields))
        return {"text": found.answers[0], "neighbors": found.neighbors}

    def page(self) -> str:
        """The HTML page."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(page_file("explore.html.j2")).render(
            name=self.name,
            num_documents=len(self.session.memory),
            max_docs=self.session.generator.layout.max_docs,
            views=model_protocols.VIEWS,
            nulls=tuple(guidance.NULLS),
            decodings=(tasks.SEQUENTIAL, tasks.JACOBI),
            max_candidates=MAX_CANDIDATES,
            is_tuned=bool(self.session.tuned_on),
            silhouette=SILHOUETTE,
        )

    def _docs(self, fields: dict[str, Any]) -> int:
        return _integer(fields, "docs", 0, 0, self.session.generator.layout.max_docs)


def page_file(name: str) -> str:
    """A file of the page."""
    return resources.files("rag_mm.report").joinpath(name).read_text("utf-8")


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"The field {name} is missing or not a text.")
    return value


def _integer(fields: dict[str, Any], name: str, default: int, minimum: int, maximum: int) -> int:
    try:
        value = int(fields.get(name, default))
    except (TypeError, ValueError, OverflowError):
        value = minimum - 1
    if not minimum <= value <= maximum:
        raise UserError(f"The field {name} must be an integer from {minimum} to {maximum}.")
    return value


def _float(fields: dict[str, Any], name: str, default: float) -> float:
    try:
        value = float(fields.get(name, default))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"The field {name} must be a number.")
    return value


def _as_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with numbers for texts of numbers, as an address has them."""
    return {name: _as_number(value) for name, value in fields.items()}


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        number = files.parse_json(value)
    except ValueError:
        return value
    return number if type(number) in (int, float) else value
