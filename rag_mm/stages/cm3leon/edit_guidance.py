"""Edits with two conditions, the picture and the instruction, each with a weight of its own.

The weights are those of InstructPix2Pix, as CM3Leon uses them (section 4.1; docs/papers/cm3leon.md):

    l_0 + image weight (l_picture - l_0) + text weight (l_full - l_picture)

with l_0 the logits without picture and instruction. 1 and 1 is plain sampling.
"""

from collections.abc import Mapping, Sequence

from rag_mm.core.errors import UserError
from rag_mm.decode import guidance
from rag_mm.decode.guidance import Guidance
from rag_mm.worlds.emoji import scene_edits

EDITS = (scene_edits.RECOLOR.name, scene_edits.MOVE.name)
FIGURES = ("fidelity", "compliance", "joint")
Weights = tuple[float, float]  # of the picture and of the instruction
PLAIN: Weights = (1.0, 1.0)
WEIGHTS: tuple[Weights, ...] = (
    *((0.0, 1.0), (0.5, 1.0), PLAIN, (1.5, 1.0), (2.0, 1.0), (3.0, 1.0)),
    *((1.0, 0.0), (1.0, 1.5), (1.0, 2.0), (1.0, 3.0)),
)
NULLS = (guidance.DOCUMENTS, guidance.BARE)  # The null prompts that are read.


def name(task: str, weights: Weights) -> str:
    """The name of an edit with these weights, in files and among figures."""
    image, text = weights
    return f"guided_{task}_i{image:g}_t{text:g}"


def steering(weights: Weights) -> Guidance | None:
    """For `tasks.generate_codes`; None for plain sampling.

    The picture is a document before the main one, so it is the documents' weight that is the picture's.
    """
    image, text = weights
    return None if weights == PLAIN else Guidance(text, documents_weight=image)


def checked(pairs: Sequence[Sequence[float]]) -> tuple[Weights, ...]:
    """The pairs as weights; UserError unless they are, and if there are any, `PLAIN` is among them."""
    made = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise UserError(f"edit_weights has {pair!r}; give pairs, of the image and of the text.")
        guidance.check_number("image weight", pair[0], 0, guidance.LARGEST)
        guidance.check_number("text weight", pair[1], 0, guidance.LARGEST)
        made.append((float(pair[0]), float(pair[1])))
    if made and PLAIN not in made:
        raise UserError("edit_weights lacks (1, 1), which the others are compared with; add it.")
    return tuple(made)


def measured(weights: Sequence[Weights], values: Mapping[str, object], task: str) -> list[Weights]:
    """Those of the weights with which an edit was measured."""
    return [pair for pair in weights if name(task, pair) in values]
