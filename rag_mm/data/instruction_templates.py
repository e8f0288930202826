"""The wordings of CM3Leon's tasks, several for each, so that a model does not depend on one (Table 5).

The first of a task is the one that it is asked by; training draws from all. A text holds few words, as a
decoder reserves few tokens for one.
"""

from rag_mm.data.instruction_items import Template

_QUESTIONS = (
    Template("{question:cut} {answer:cut}"),
    Template("{question:cut} answer: {answer:cut}"),
    Template("q: {question:cut} a: {answer:cut}"),
)


def _structures(name: str, other: str) -> tuple[Template, ...]:
    text = "{name:cut} on a {color} background"
    return Template(text, (name,)), Template(text, (other,)), Template(f"draw {text}", (name,))


TEMPLATES: dict[str, tuple[Template, ...]] = {
    # A caption, as a decoder reads it in pretraining.
    "text_to_image": (Template("{caption:cut}"),),
    # Edits of a given picture.
    "edit": (
        Template("{edit:cut}", ("edit",)),
        Template("{edit:cut}", ("change",)),
        Template("edit: {edit:cut}", ("edit",)),
    ),
    "recolor": (
        Template("change the background to {color}", ("edit",)),
        Template("make the background {color}", ("edit",)),
        Template("on a {color} background", ("change",)),
    ),
    "move": (
        Template("move the {name:cut} to the {place}", ("edit",)),
        Template("put the {name:cut} at the {place}", ("edit",)),
        Template("{name:cut} to the {place}", ("change",)),
    ),
    "swap": (
        Template("replace the {name:cut}", ("edit", "with")),
        Template("swap the {name:cut}", ("edit", "with")),
        Template("replace the {name:cut}", ("change", "with")),
    ),
    # Boxes in words: left, top, right and bottom in pixels.
    "boxes": (
        Template("{caption:cut} {boxes:cut}"),
        Template("{boxes:cut}"),
        Template("draw {caption:cut} {boxes:cut}"),
    ),
    "draw_boxes": (
        Template("{name:cut} at {box} on a {color} background"),
        Template("draw {name:cut} at {box} on a {color} background"),
        Template("{name:cut} in {box} on a {color} background"),
    ),
    # Feature maps.
    "structure": (
        Template("{caption:cut}", ("{feature}",)),
        Template("{caption:cut}", ("draw from {feature}",)),
    ),
    "from_silhouette": _structures("silhouette", "outline"),
    "from_edges": _structures("edges", "lines"),
    # Texts about the main picture.
    "caption": (
        Template("describe it: {answer:cut}"),
        Template("{answer:cut}"),  # as in pretraining
        Template("caption: {answer:cut}"),
    ),
    "question": _QUESTIONS,
    "what": _QUESTIONS,
    "where": _QUESTIONS,
    "which_color": _QUESTIONS,
    "how_many": _QUESTIONS,
}
"""Task -> wordings."""
