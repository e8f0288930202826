"""Retrieval-augmented multimodal models in JAX.

import rag_mm
run = rag_mm.load("runs/quickstart")
run.generate("red apple at the top left on a blue background", docs=2).images
run.caption(image).captions
run.memory.search(text="red apple")
"""

import typing

if typing.TYPE_CHECKING:
    from rag_mm.stages.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(workdir: str) -> "Session":
    """Loads a finished run; see `rag_mm.stages.session.Session` for what it can do.

    Raises:
        rag_mm.core.errors.UserError: there is no such run, or it is not finished.
    """
    # Here, not above: importing the package loads no framework.
    from rag_mm.stages import session

    return session.load(workdir)
