"""Stage `emu_data`: collects what Emu trains on, makes its text vocabulary, and encodes all pictures once.

The image tower is the run's retriever, frozen; its tokens of a picture never change, so that a training step
reads them from files. Where the tower is to be trained, the files hold pixels.
"""

import dataclasses
import json

import numpy as np
from etils import epath

from rag_mm.core import checks, digests, files, image_files, run_folder
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import open_documents, vocabulary
from rag_mm.stages.emu import album, training_documents
from rag_mm.stages.shared import train_retriever, world_config

INPUTS = ("retriever", "memory")
PICTURES, VOCABULARY = "pictures", "vocabulary.json"
TOKENS, PIXELS = "tokens", "pixels"
_NUM_SPECIALS = len(dataclasses.fields(SlotTokens))


@dataclasses.dataclass(frozen=True)
class EmuDataStageConfig:
    """What there is to train on, beside the pairs of the world's training documents.

    Attributes:
        seed: unused; all is the same for the same world.
        world: world of the documents.
        num_stories: stories of emoji scenes of seen classes, at most one of each training scene.
        num_clips: clips of 8 frames, likewise.
        documents: further documents of any texts, images and videos, as for `--documents` of
            `rag-mm memory build`; None: none.
        digest: digest of `documents`. It is computed, so that a changed folder is another config.
        vocab_size: maximum number of text ids.
        pictures: tokens: the files hold the retriever's tokens of each picture in float16; or pixels, for a
            tower that is trained.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    num_stories: int = 6000
    num_clips: int = 1500
    documents: str | None = None
    digest: str = dataclasses.field(init=False, default="")
    vocab_size: int = 1024
    pictures: str = TOKENS

    def __post_init__(self):
        checks.at_least(self, 0, "num_stories", "num_clips")
        checks.at_least(self, 256, "vocab_size")
        checks.one_of(self, "pictures", (TOKENS, PIXELS))
        if self.documents is not None:
            object.__setattr__(self, "digest", _digest(self.documents))

    def collect(self, run: run_folder.Run) -> training_documents.TrainingDocuments:
        """The documents; raises as `training_documents.collect` does."""
        return training_documents.collect(
            self.world, run, self.num_stories, self.num_clips, self.documents
        )


def run(config: EmuDataStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes `vocabulary.json` and `pictures/*.npy`, of which those that are there already are kept.

    Returns:
        The numbers of documents by kind, of pictures and of text ids.
    """
    documents, encoder = config.collect(run), train_retriever.load_encoder(run.workdir)

    def encode(pixels: np.ndarray) -> np.ndarray:
        if config.pictures == TOKENS:
            return encoder.encode_image_tokens(pixels).astype(np.float16)
        return np.stack([image_files.fit(each, encoder.image_size) for each in pixels])

    album.write(documents.album, stage_dir / PICTURES, encode)
    # A codebook and a sentinel of one id each are never used: only the text ids are.
    made = vocabulary.train_vocabulary(documents.texts, config.vocab_size, 1, 1)
    made.save(stage_dir / VOCABULARY)
    groups = ("pairs", "memory", "stories", "clips", "documents")
    return {name: len(getattr(documents, name)) for name in groups} | {
        "pictures": len(documents.album),
        "text_ids": made.text_size,
    }


def load_vocabulary(run: run_folder.Run) -> vocabulary.Vocabulary:
    """The vocabulary of the run's texts; raises UserError if the stage is unfinished or edited."""
    return vocabulary.load_vocabulary(run.finished_stage("emu_data") / VOCABULARY)


def load_pictures(run: run_folder.Run) -> album.PictureArrays:
    """The arrays of all pictures; raises as above."""
    return album.PictureArrays.open(run.finished_stage("emu_data") / PICTURES)


def slot_tokens(text_size: int) -> SlotTokens:
    """The special ids, right after the text ids."""
    return SlotTokens(*range(text_size, text_size + _NUM_SPECIALS))


def _digest(documents: str) -> str:
    # The fingerprint of a folder covers its captions only.
    folder = epath.Path(documents)
    pixels = digests.folder_digests(folder) if folder.is_dir() else {}
    source = open_documents.open_documents(documents)
    return files.digest(json.dumps([source.fingerprint, pixels], sort_keys=True).encode())
