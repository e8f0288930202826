"""World of documents that are known by their codes alone, in a corpus: for runs of given models."""

import dataclasses
from typing import Any

from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_manifest
from rag_mm.corpus.corpus_reader import TokenCorpus


@dataclasses.dataclass(frozen=True)
class CorpusWorld:
    """A corpus in place of documents. It gives its image tokenizer; there are no images to measure with.

    Attributes:
        corpus: folder that `rag-mm corpus build` made.
        fingerprint: of the corpus. It is computed, so that another corpus is another world.
        image_size: side in pixels to which its images were scaled. It is computed.
    """

    corpus: str
    fingerprint: str = dataclasses.field(init=False, default="")
    image_size: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if not self.corpus:
            raise ValueError(
                "corpus is empty; name a folder made by `rag-mm corpus build` with "
                "--config.world.corpus=DIR"
            )
        found = TokenCorpus(self.corpus)
        object.__setattr__(self, "fingerprint", found.fingerprint)
        object.__setattr__(self, "image_size", found.manifest.image_size)

    @property
    def tokenizer(self) -> str:
        """Folder of its image tokenizer and text vocabulary."""
        return f"{self.corpus}/{corpus_manifest.TOKENIZER}"

    def scenes(self, role: str, *split_names: str) -> Any:
        """Raises UserError: there are no images."""
        raise UserError(
            f"{self.corpus} holds codes and no images; take a world of documents for what reads images."
        )
