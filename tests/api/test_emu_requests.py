"""Requests to an Emu that are refused before its model is read."""

import numpy as np
import pytest

from rag_mm.api.emu_session import EmuSession
from rag_mm.core.errors import UserError

FRAMES = np.zeros((9, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("frames", [FRAMES, list(FRAMES)], ids=["array", "list"])
def test_too_many_frames_are_refused_in_one_sentence(frames):
    with pytest.raises(UserError, match="There are 9 images; give at most 8") as error:
        EmuSession(None, None).caption(frames)  # type: ignore[arg-type]
    assert str(error.value).count(". ") == 0
    with pytest.raises(UserError, match="There is no image to caption"):
        EmuSession(None, None).caption(FRAMES[:0])  # type: ignore[arg-type]
