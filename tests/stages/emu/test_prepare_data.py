"""The stage emu_data: its pictures keep the numbers they were written with, and folders are hashed once."""

import json

import numpy as np
import pytest
from etils import epath

from rag_mm.core import digests, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.core.image_files import encode_png
from rag_mm.data import sources
from rag_mm.stages.emu import prepare_data
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.shared import train_retriever, world_config

WORLD = world_config.EmojiWorld(class_share=0.02, seed=3)


class FakeEncoder:
    """Tokens of a picture: its mean, so that no tower is needed."""

    image_size = 32

    def __init__(self):
        self.num_encoded = 0

    def encode_image_tokens(self, pixels):
        self.num_encoded += len(pixels)
        return pixels.mean((1, 2))[:, None]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A run whose stage was written to its folder, which counts as finished; its config and the encoder."""
    encoder = FakeEncoder()
    monkeypatch.setattr(train_retriever, "load_encoder", lambda workdir: encoder)
    run = run_folder.Run(epath.Path(tmp_path))
    folder = run.stage_dir("emu_data")
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, name: folder)
    config = EmuDataStageConfig(0, WORLD, num_stories=5, num_clips=5, vocab_size=256)
    prepare_data.run(config, run, folder)
    return run, config, encoder


def test_pictures_have_the_numbers_of_the_documents(prepared):
    run, config, encoder = prepared
    album = config.collect(run).album
    pictures = prepare_data.load_pictures(run, album)
    assert len(pictures) == len(album) == encoder.num_encoded
    for number in (0, len(album) // 2, len(album) - 1):
        wanted = album.pixels(number).mean((0, 1))
        np.testing.assert_allclose(pictures.take(np.array(number))[0], wanted, rtol=1e-3)


def test_another_numbering_is_refused_in_one_sentence(prepared):
    run, config, _ = prepared
    album, other = config.collect(run).album, Album()
    keys = list(album._numbers)
    # The same pictures, but two of them changed places.
    for key in (keys[1], keys[0], *keys[2:]):
        other.add(key, lambda: np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="are numbered otherwise than this version numbers them"):
        prepare_data.load_pictures(run, other)
    # As a version left it that kept no numbering.
    (run.stage_dir("emu_data") / prepare_data.NUMBERING).unlink()
    with pytest.raises(UserError, match="delete the folder and train again"):
        prepare_data.load_pictures(run, album)


def test_an_interrupted_stage_keeps_its_pictures_if_their_numbers_stay(prepared):
    run, config, encoder = prepared
    folder, count = run.stage_dir("emu_data"), encoder.num_encoded
    prepare_data.run(config, run, folder)
    assert encoder.num_encoded == count
    files.write_json(folder / prepare_data.NUMBERING, {"pictures": 1, "digest": "other"})
    prepare_data.run(config, run, folder)
    assert encoder.num_encoded == 2 * count
    prepare_data.load_pictures(run, config.collect(run).album)


def test_a_folder_of_documents_is_hashed_once_unless_it_changes(tmp_path, monkeypatch):
    pixels = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    line = {"id": "d", "segments": [{"text": "x"}, {"image": "a.png"}]}
    (tmp_path / sources.CAPTIONS).write_text(json.dumps(line))
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**12))
    hashed, digest = [], digests.folder_digests
    monkeypatch.setattr(
        digests, "folder_digests", lambda *folder: hashed.append(folder) or digest(*folder)
    )
    make = lambda: EmuDataStageConfig(0, WORLD, documents=str(tmp_path)).digest
    first = {make() for _ in range(3)}
    assert len(first) == len(hashed) == 1
    # The captions stay as they are.
    (tmp_path / "a.png").write_bytes(encode_png(pixels + 1))
    assert make() not in first and len(hashed) == 2
