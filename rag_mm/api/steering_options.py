"""Guidance and contrastive decoding from flat options, as a command or a form has them."""

from collections.abc import Mapping
from typing import Any

from rag_mm.core.errors import UserError
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance

NULL, GUIDANCE, CONTRAST = "null", "guidance", "contrast"
# Option -> field. The first of each gives the group; the others need it, and `null` one of the two.
GUIDANCE_OPTIONS = {
    GUIDANCE: "weight",
    "documents_guidance": "documents_weight",
    "plausible": "plausible",
}
CONTRAST_OPTIONS = {
    CONTRAST: "k",
    "contrast_alpha": "alpha",
    "amateur_temperature": "amateur_temperature",
    "contrast_floor": "floor",
}
NAMES = (NULL, *GUIDANCE_OPTIONS, *CONTRAST_OPTIONS)


def parse(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `guidance` and `contrast` of `Session.generate`: a `Guidance` and a `Contrast`, or None.

    Args:
        options: values of some of `NAMES`, None for an option that is not given; others are not read.

    Raises:
        UserError: a value is out of range, or an option is given without the one that it changes.
    """
    given = {name: options[name] for name in NAMES if options.get(name) is not None}
    null = {NULL: given[NULL]} if NULL in given else {}
    if null and GUIDANCE not in given and CONTRAST not in given:
        raise UserError(
            f"null is {given[NULL]!r}, but there is no guidance and no contrast; give one."
        )
    guidance = _fields(given, GUIDANCE_OPTIONS)
    contrast = _fields(given, CONTRAST_OPTIONS)
    return {
        GUIDANCE: Guidance(**guidance, **null) if guidance else None,
        CONTRAST: Contrast(**contrast, **null) if contrast else None,
    }


def _fields(given: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """The given fields of one class; raises UserError where its first is missing."""
    fields = {field: given[name] for name, field in options.items() if name in given}
    first = next(iter(options))
    if fields and first not in given:
        other = next(name for name in options if name in given)
        raise UserError(f"{other} is {given[other]!r}, but there is no {first}; give it too.")
    return fields
