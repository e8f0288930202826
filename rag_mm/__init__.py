"""Retrieval-augmented multimodal models in JAX.

import rag_mm
run = rag_mm.load("runs/quickstart")
run.generate("red apple at the top left on a blue background", docs=2).images  # uint8 [1, H, W, 3]
run.caption(image).captions  # image: uint8 [H, W, 3]
run.memory.search(text="red apple")
"""

import typing

if typing.TYPE_CHECKING:
    from rag_mm.api.emu_session import EmuSession
    from rag_mm.api.imported import ImportedModel
    from rag_mm.api.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    workdir: str,
    dtype: str | None = None,
    mesh: tuple[int, int, int] | None = None,
    stage: str = "decoder",
) -> "Session | EmuSession | ImportedModel":
    """Loads a finished run, or a run made by `rag-mm import`.

    Example:
        run = rag_mm.load("runs/quickstart")
        image = run.generate("red apple on a blue background").images[0]

    Args:
        workdir: the run folder.
        dtype: of an imported LLaMA, Chameleon or Emu, the dtype of weights and activations, such as
            `float32`; None keeps the stored one.
        mesh: numbers of devices along data, fsdp and tensor on which the decoder is loaded: the first two
            split the images or texts made at once, the last the model's heads. None: one device.
        stage: of a run trained with rag-mm, the stage whose decoder is loaded, such as `sft` for the one
            tuned on instructions.

    Returns:
        `rag_mm.api.session.Session` (generate, caption, infill, memory, and if tuned edit and ask) for a run
        trained with rag-mm; `rag_mm.api.emu_session.EmuSession` (caption, ask, chat, generate, memory) for
        one of Emu; for an imported CLIP, LLaMA, Chameleon or Emu a class of `rag_mm.api.imported`; for an
        imported image tokenizer `rag_mm.stages.shared.frozen.FrozenTokenizer`.

    Raises:
        rag_mm.core.errors.UserError: there is no run in `workdir`, or it is unfinished or was edited;
            `dtype` is unknown; `dtype` or `stage` is given for another kind of run; the run has no such
            stage, finished, with a decoder; or the mesh does not fit.
    """
    # Imported here, so that `import rag_mm` loads no framework.
    from rag_mm.api import emu_session, imported, session
    from rag_mm.core.errors import UserError

    is_imported = imported.is_imported(workdir)
    is_emu = not is_imported and emu_session.is_emu(workdir)
    if stage != "decoder" and (is_imported or is_emu):
        raise UserError(
            f"stage={stage!r} is for runs that trained a decoder; load {workdir} without it."
        )
    if is_imported:
        return imported.load(workdir, dtype, mesh)
    if dtype is not None:
        raise UserError(f"dtype={dtype!r} is for imported checkpoints; load {workdir} without it.")
    if is_emu:
        return emu_session.load(workdir, mesh)
    return session.load(workdir, mesh, stage)
