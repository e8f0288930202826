"""Which null prompts (`decode.guidance`) the training of a decoder showed it."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from rag_mm.core import configuration, run_folder
from rag_mm.core.errors import UserError
from rag_mm.decode import guidance
from rag_mm.stages.ra_cm3.corpus_mixture import PackedSequencesConfig
from rag_mm.stages.ra_cm3.drawn_sequences import MaskingConfig
from rag_mm.stages.ra_cm3.training_sequences import SequencesConfig


def shown(
    masking: MaskingConfig,
    sequences: SequencesConfig | PackedSequencesConfig,
    lacks_docs: bool = False,
) -> list[str]:
    """The null prompts that occur in such training sequences.

    Args:
        masking: their masked spans.
        sequences: their documents.
        lacks_docs: whether some have no documents whatever `sequences` says, as a baseline's.
    """
    masks_segments = bool(masking.max_spans and masking.prob and masking.segment_prob)
    masks_captions = masks_segments or masking.caption_prob > 0
    lacks_docs = lacks_docs or sequences.num_docs_weights[0] > 0
    occurs = {
        guidance.DOCUMENTS: masks_captions,
        guidance.BARE: masks_captions and lacks_docs,
        guidance.CAPTION: lacks_docs,
    }
    return [null for null in guidance.NULLS if occurs[null]]


def load(stage_dir: epath.Path, record: Mapping[str, Any]) -> list[str]:
    """The null prompts that a trained decoder knows.

    Args:
        stage_dir: the stage's folder.
        record: its decoder.json. Earlier ones lack `null_prompts`; those then follow from the config in the
            stage's manifest, and there are none if that cannot be read.
    """
    recorded = record.get("null_prompts")
    if isinstance(recorded, list):
        return [null for null in guidance.NULLS if null in recorded]
    manifest = run_folder.Run(stage_dir.parent).manifest(stage_dir.name)
    if manifest is None:
        return []
    config = manifest.config
    try:
        masking = configuration.make(MaskingConfig, config["masking"], "masking")
        sequences = configuration.make(SequencesConfig, config["sequences"], "sequences")
    except (KeyError, TypeError, UserError):
        return []
    return shown(masking, sequences, bool(config.get("is_baseline")))
