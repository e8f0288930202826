"""Pages of chains that pretrain a decoder of published sizes, and the same as pages of one model's sizes.

Its vocabulary follows from the corpora, which a plan does not read; the page says how large it is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_mm.core import checks, configuration
from rag_mm.core.errors import UserError
from rag_mm.models import ra_cm3
from rag_mm.nn.decoder import DecoderConfig

KEY, STAGE = "plan", "pretraining"


@dataclasses.dataclass(frozen=True)
class ChainSizes:
    """Sizes that a plan is made with, and training takes from the corpora.

    Attributes:
        family: cm3leon | ra_cm3.
        vocab_size: number of tokens.
        code_offset: first image code among them.
        image_size: pixels a side of the images that are encoded.
        code_size: pixels a side of a code, a power of two.
        text_len: tokens of a document's text.
        retriever: the public CLIP that embeds documents: b32 (ViT-B/32, CM3Leon's) or l14 (ViT-L/14).
    """

    family: str
    vocab_size: int
    code_offset: int
    image_size: int = 256
    code_size: int = 8
    text_len: int = 32
    retriever: str = "b32"

    def __post_init__(self):
        checks.at_least(self, 1, "vocab_size", "code_offset", "image_size", "code_size", "text_len")
        checks.one_of(self, "retriever", ("b32", "l14"))
        if self.code_offset >= self.vocab_size:
            raise ValueError(
                f"code_offset is {self.code_offset}; give less than vocab_size={self.vocab_size}"
            )


def chain_page(
    family: str,
    model: ra_cm3.RACM3Config,
    optimizer: Mapping[str, Any],
    *,
    num_steps: int,
    batch_size: int,
) -> dict[str, Any]:
    """A chain that trains a decoder on a corpus; the corpus, a memory and its retriever are given.

    Args:
        family: cm3leon | ra_cm3.
        model: the decoder and its loss, with the vocabulary to plan for.
        optimizer: its settings.
        num_steps: training steps.
        batch_size: rows of the decoder's `max_seq_len` tokens per step.
    """
    values = dataclasses.asdict(model.decoder)
    shape = configuration.without_defaults(configuration.Section(DecoderConfig), values)
    for name in ("vocab_size", "max_seq_len", "dtype"):
        shape.pop(name, None)
    given = {"optimizer": {}, "loop": {"num_steps": 1}}  # Nothing of them is trained.
    return {
        "stages": ("tokenizer", "retriever", "memory", STAGE),
        "seed": 0,
        "world": {"corpus": "corpus"},
        KEY: {
            "family": family,
            "vocab_size": values["vocab_size"],
            "code_offset": model.code_offset,
        },
        "tokenizer": {**given, "model": {}},
        "retriever": {**given, "folder": "memory/retriever"},
        "memory": {"folder": "memory"},
        STAGE: {
            "model": shape,
            "optimizer": dict(optimizer),
            "loop": {"num_steps": num_steps, "checkpoint_every": 500},
            # Three images of 1,024 codes with their texts fit a row of 4,096 tokens.
            "sequences": {"max_seq_len": values["max_seq_len"], "max_text_len": 128},
            "alpha": model.alpha,
            "sentinel_weight": model.sentinel_weight,
            "normalize_by": model.normalize_by,
            "batch_size": batch_size,
            "scale": {"dtype": values["dtype"]},
        },
    }


def is_chain(page: Mapping[str, Any]) -> bool:
    """Whether a page is a chain that pretrains a decoder of planned sizes."""
    return "stages" in page and KEY in page


def model_page(page: Mapping[str, Any]) -> Mapping[str, Any]:
    """The page of the sizes of a chain's decoder, as `cases.PlanPage` has them; another page as it is.

    Args:
        page: plain values, with or without defaults.

    Raises:
        UserError: the chain trains no decoder on corpora.
    """
    if not is_chain(page):
        return page
    if STAGE not in page:
        raise UserError(f"The config has {KEY!r}, but no stage {STAGE!r} to plan.")
    trained, sizes = page[STAGE], page[KEY]
    scale = trained.get("scale", {})
    decoder = {
        **trained["model"],
        "vocab_size": sizes["vocab_size"],
        "max_seq_len": trained["sequences"]["max_seq_len"],
        "dtype": scale.get("dtype", "float32"),
        "remat": scale.get("remat", "none"),
    }
    model = {
        "decoder": decoder,
        "code_offset": sizes["code_offset"],
        "alpha": trained.get("alpha", 0.1),
        "sentinel_weight": trained.get("sentinel_weight", 0.0),
        "normalize_by": trained.get("normalize_by", "main"),
        "loss_chunks": scale.get("loss_chunks", 1),
    }
    return {
        "family": sizes["family"],
        "model": model,
        "optimizer": trained["optimizer"],
        "num_steps": trained["loop"]["num_steps"],
        "batch_size": trained["batch_size"],
        "accumulate": scale.get("num_parts", 1),
    }
