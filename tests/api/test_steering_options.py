"""Guidance and contrast from the flat options of a command or a form."""

import pytest

from rag_mm.api import steering_options
from rag_mm.core.errors import UserError
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance


@pytest.mark.parametrize(
    ("options", "guidance", "contrast"),
    [
        ({}, None, None),
        (dict(guidance=None, null=None, seed=3), None, None),
        (dict(guidance=0.0), Guidance(0.0), None),
        (dict(guidance=2, null="caption", plausible=0.1), Guidance(2, "caption", None, 0.1), None),
        (dict(guidance=2, documents_guidance=0.0), Guidance(2, documents_weight=0.0), None),
        (dict(contrast=1), None, Contrast()),
        (
            dict(contrast=2, contrast_alpha=0.5, amateur_temperature=0.7, contrast_floor=0.2, null="bare"),
            None,
            Contrast(2, 0.5, 0.7, 0.2),
        ),
        (dict(guidance=2, contrast=1, null="caption"), Guidance(2, "caption"), Contrast(null="caption")),
    ],
)  # fmt: skip
def test_options_become_fields(options, guidance, contrast):
    assert steering_options.parse(options) == {"guidance": guidance, "contrast": contrast}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(null="bare"), "null is 'bare', but there is no guidance and no contrast; give one."),
        (dict(plausible=0.1), "plausible is 0.1, but there is no guidance; give it too."),
        (dict(documents_guidance=1), "documents_guidance is 1, but there is no guidance; give it too."),
        (dict(guidance=2, contrast_floor=1), "contrast_floor is 1, but there is no contrast; give it too."),
        (dict(guidance=-1), "guidance weight is -1; give a number from 0 to 1e+30."),
        (dict(contrast="one"), "contrast k is 'one'; give an integer of at least 1."),
        (dict(guidance=True, null=[]), "null is []; give one of documents, bare, caption."),
    ],
)  # fmt: skip
def test_what_is_refused(options, says):
    with pytest.raises(UserError) as refused:
        steering_options.parse(options)
    assert str(refused.value) == says
