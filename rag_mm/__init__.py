"""Retrieval-augmented multimodal models in JAX.

import rag_mm
run = rag_mm.load("runs/quickstart")
run.generate("red apple at the top left on a blue background", docs=2).images
run.caption(image).captions
run.memory.search(text="red apple")
"""

import typing

if typing.TYPE_CHECKING:
    from rag_mm.api.imported import Imported
    from rag_mm.api.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(workdir: str) -> "Session | Imported":
    """Loads a finished run, or an imported one.

    A finished run is a `rag_mm.api.session.Session`; what a CLIP, a LLaMA or a Chameleon can do stands
    in `rag_mm.api.imported`.

    Raises:
        rag_mm.core.errors.UserError: there is no such run, or it is not finished.
    """
    # Here, not above: importing the package loads no framework.
    from rag_mm.api import imported, session

    return imported.load(workdir) if imported.is_imported(workdir) else session.load(workdir)
