"""Names that changed: whoever uses an old one is told the new one. The list for people is docs/renames.md.

Stored model configs are another matter: files keep the old names, so that the fingerprints of models, and of
the memories that were built with them, stay what they were.
"""

from collections.abc import Mapping
from typing import Any

_TOKENIZER = {
    "model.is_turned": "model.random_flip_rotate",
    "text_size": "text.vocab_size",
    "num_sentinels": "text.num_sentinels",
    "caption_draws": "text.captions_per_image",
}
_RETRIEVER = {
    "caption_draws": "captions_per_image",
    "max_text": "model.max_text_len",
    "embed_dim": "model.embed_dim",
    "num_heads": "model.num_heads",
    "vision_layers": "model.vision_layers",
    "text_layers": "model.text_layers",
    "patch_size": "model.patch_size",
    "projection_dim": "model.projection_dim",
}
_DECODER = {
    "caption_draws": "sequences.captions_per_image",
    "max_docs": "sequences.max_docs",
    "docs_shares": "sequences.num_docs_weights",
    "max_text": "sequences.max_text_len",
    "docs_text": "sequences.mean_doc_text_len",
    "full_captions": "sequences.full_caption_prob",
    "code_noise": "sequences.code_noise",
    "max_spans": "masking.max_spans",
    "mask_probability": "masking.prob",
    "segment_probability": "masking.segment_prob",
    "caption_probability": "masking.caption_prob",
    "is_vanilla": "is_baseline",
    "mesh": "scale.mesh",
    "model.dtype": "scale.dtype",
    "model.remat": "scale.remat",
}
_INIT = {
    "init_std": "init.std",
    "init_cut": "init.cut",
    "output_init_std": "init.output_std",
    "position_init_std": "init.position_std",
    "head_init_std": "init.head_std",
}
_FUSION = {
    "search.control": "search.retrieval_override",
    "curve_neighbors": "measures.curve_neighbors",
    "curve_rows": "measures.curve_rows",
    "question_weight": "measures.question_weight",
}
# Stages: old name -> new name. Finished runs keep their folders, under the old names.
STAGES = {"toy_fusion": "fusion", "document_fusion": "fusion"}
_IN_STAGES = {
    "tokenizer": _TOKENIZER | {"imported": "folder"},
    "retriever": _RETRIEVER,
    "neighbors": {
        "caption_draws": "captions_per_image",
        "by_phrase": "split_phrases",
        "token_dropout": "word_dropout",
    },
    "decoder": _DECODER | {f"model.{old}": f"model.{new}" for old, new in _INIT.items()},
    "copy_probe": _DECODER | {f"model.{old}": f"model.{new}" for old, new in _INIT.items()},
    "generation": {"controls": "document_ablations"},
    "pairs": {"caption_draws": "captions_per_image"},
    "fusion": _FUSION,
    "toy_fusion": _FUSION,
    "document_fusion": _FUSION,
}
# Old name -> new name of stages, of dotted config keys, of config pages, and of commands' options.
RENAMES = {
    **STAGES,
    **{
        f"{stage}.{old}": f"{STAGES.get(stage, stage)}.{new}"
        for stage, names in _IN_STAGES.items()
        for old, new in names.items()
    },
    **{f"model.decoder.{old}": f"model.decoder.{new}" for old, new in _INIT.items()},
    "world.spread": "world.class_spread",
    "world.noise": "world.noise_std",
    "configs/own_pictures.py": "configs/own_images.py",
    "rag-mm ablate --borrow": "rag-mm ablate --reuse",
}
# Settings that a stage does not have although others do -> why.
_COMPARED = (
    "its loss compares the pairs of a batch with each other, which parts of it would not meet"
)
_NO_CONTEXT = "the stage gives its decoder no context to read"
ABSENT = {
    "retriever.scale.num_parts": _COMPARED,
    "fusion.scale.num_parts": _COMPARED,
    "fusion.scale.num_workers": "its batches are rows of arrays, which need no processes to be made",
    "decoder.model.context_dim": _NO_CONTEXT,
    "copy_probe.model.context_dim": _NO_CONTEXT,
    "tokenizer.scale.loss_chunks": "it has no loss over a vocabulary or over pairs to be computed in chunks",
}


def hint(old: str) -> str:
    """The end of an error message about an old name, "; it is now called NEW", or about one of `ABSENT`.

    "" for any other name.
    """
    stage, dot, rest = old.partition(".")
    new = RENAMES.get(old, f"{STAGES[stage]}{dot}{rest}" if stage in STAGES else None)
    if old in ABSENT:
        return f": {ABSENT[old]}"
    return "" if new is None else f"; it is now called {new!r}"


# Old name, as files have it -> name in the code.
_STORED = {"max_text": "max_text_len", "is_turned": "random_flip_rotate"}


def to_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config under the names that files have."""
    old = {new: old for old, new in _STORED.items()}
    return {old.get(key, key): value for key, value in config.items()}


def from_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config under today's names, from a file of any version; nested configs too."""
    found: dict[str, Any] = {}
    init: dict[str, Any] = {}
    for key, value in config.items():
        value = from_stored(value) if isinstance(value, Mapping) else value
        if key in _INIT:
            init[_INIT[key].removeprefix("init.")] = value
        else:
            found[_STORED.get(key, key)] = value
    return found | {"init": {**found.get("init", {}), **init}} if init else found
