"""Stage `emu_data`: collects what Emu trains on, makes its text vocabulary, and encodes all pictures once.

The image tower is the run's retriever, frozen; its tokens of a picture never change, so that a training step
reads them from files. Where the tower is to be trained, the files hold pixels.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import checks, files, image_files, manifest_values, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents, vocabulary
from rag_mm.stages.emu import album, emu_text, training_documents
from rag_mm.stages.shared import starting_point, train_retriever, world_config

INPUTS = ("retriever", "memory")
PICTURES, VOCABULARY, NUMBERING = "pictures", "vocabulary.json", "numbering.json"
TOKENS, PIXELS = "tokens", "pixels"


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
        vocab_size: maximum number of text ids; not read with `language_model`.
        pictures: tokens: the files hold the retriever's tokens of each picture in float16; or pixels, for a
            tower that is trained.
        language_model: folder of a run of `rag-mm import llama`, whose tokenizer reads the texts; None: a
            tokenizer is made from the texts.
        language_model_fingerprint: of what was imported there. It is computed, so that another model is
            another config.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    num_stories: int = 6000
    num_clips: int = 1500
    documents: str | None = None
    digest: str = dataclasses.field(init=False, default="")
    vocab_size: int = 1024
    pictures: str = TOKENS
    language_model: str | None = dataclasses.field(
        default=None, metadata=manifest_values.ADDED_LATER
    )
    language_model_fingerprint: str = dataclasses.field(
        init=False, default="", metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        checks.at_least(self, 0, "num_stories", "num_clips")
        checks.at_least(self, 256, "vocab_size")
        checks.one_of(self, "pictures", (TOKENS, PIXELS))
        if self.documents is not None:
            object.__setattr__(self, "digest", open_documents.digest(self.documents))
        if self.language_model is not None:
            found = starting_point.fingerprint(self.language_model, emu_text.SETTING)
            object.__setattr__(self, "language_model_fingerprint", found)

    def collect(self, run: run_folder.Run) -> training_documents.TrainingDocuments:
        """The documents; raises as `training_documents.collect` does."""
        return training_documents.collect(
            self.world, run, self.num_stories, self.num_clips, self.documents
        )


def run(config: EmuDataStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes `vocabulary.json`, `numbering.json` and `pictures/*.npy`.

    An interrupted run's pictures are kept, unless they were numbered otherwise.

    Returns:
        The numbers of documents by kind, of pictures and of text ids.
    """
    documents, encoder = config.collect(run), train_retriever.load_encoder(run.workdir)

    def encode(pixels: np.ndarray) -> np.ndarray:
        if config.pictures == TOKENS:
            return encoder.encode_image_tokens(pixels).astype(np.float16)
        return np.stack([image_files.fit(each, encoder.image_size) for each in pixels])

    _keep_numbering(stage_dir, documents.album)
    album.write(documents.album, stage_dir / PICTURES, encode)
    made = _text(config, documents)
    made.save(stage_dir / VOCABULARY)
    groups = ("pairs", "memory", "stories", "clips", "documents")
    return {name: len(getattr(documents, name)) for name in groups} | {
        "pictures": len(documents.album),
        "text_ids": made.text_size,
    }


def _text(
    config: EmuDataStageConfig, documents: training_documents.TrainingDocuments
) -> emu_text.EmuText:
    if config.language_model is not None:
        return emu_text.of_language_model(config.language_model)
    # A codebook and a sentinel of one id each are never used: only the text ids are.
    return vocabulary.train_vocabulary(documents.texts, config.vocab_size, 1, 1)


def load_vocabulary(run: run_folder.Run) -> emu_text.EmuText:
    """The vocabulary of the run's texts; raises UserError if the stage is unfinished or edited."""
    return emu_text.load(run.finished_stage("emu_data") / VOCABULARY)


def load_pictures(run: run_folder.Run, numbered: album.Album) -> album.PictureArrays:
    """The arrays of the pictures of `EmuDataStageConfig.collect`, by its numbers.

    Raises:
        UserError: as above; or the stage's files are numbered otherwise, by another version.
    """
    folder = run.finished_stage("emu_data")
    if _numbering_in(folder) != _numbering(numbered):
        raise UserError(
            f"The pictures in {folder} are numbered otherwise than this version numbers them; delete the "
            "folder and train again."
        )
    return album.PictureArrays.open(folder / PICTURES)


def _numbering(numbered: album.Album) -> dict[str, Any]:
    return {"pictures": len(numbered), "digest": numbered.digest}


def _numbering_in(folder: epath.Path) -> dict[str, Any] | None:
    """What a stage's files say of their numbers; None in those of earlier versions."""
    path = folder / NUMBERING
    return files.read_object(path) if path.exists() else None


def _keep_numbering(stage_dir: epath.Path, numbered: album.Album) -> None:
    """Writes the numbering, and deletes the pictures of an interrupted run that had another one."""
    if _numbering_in(stage_dir) != _numbering(numbered):
        if (stage_dir / PICTURES).exists():
            files.discard(stage_dir / PICTURES)
        files.write_json(stage_dir / NUMBERING, _numbering(numbered))
