"""What Emu trains on: pairs, stories without test scenes, clips in the order of time, further documents."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from etils import epath

from rag_mm.core import image_files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import sources
from rag_mm.stages.emu import text_figures, training_documents
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.row_maker import RowMaker
from rag_mm.stages.emu.training_rows import InterleavedConfig, MixtureConfig, RowSource
from rag_mm.stages.shared import build_memory, world_config
from rag_mm.worlds.emoji import emoji_scenes, scene_clips, scene_facts

WORLD = world_config.EmojiWorld(class_share=0.05, seed=3)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Of a run without a memory."""
    run = run_folder.Run(epath.Path(tmp_path_factory.mktemp("run")))
    return training_documents.collect(WORLD, run, 40, 12, None)


def read(documents, numbers):
    pixels = np.stack([documents.album.pixels(number) for number in numbers])
    return scene_facts.read(pixels, [scene_clips.clip_level(WORLD.geometry)] * len(pixels))


def test_pairs_are_full_captions_of_the_pictures_of_training_scenes(documents):
    scenes = WORLD.scenes("train", *world_config.SEEN)
    assert len(documents.pairs) == len(scenes) and documents.memory == documents.documents == []
    for i in (0, 5, len(scenes) - 1):
        caption, number = documents.pairs[i]
        assert caption == scenes.full_caption(i)
        np.testing.assert_array_equal(documents.album.pixels(number), scenes.image(i))


def test_training_reads_no_picture_of_a_test_scene(tmp_path, monkeypatch):
    """Records what rows are made of, the retrieved documents and the frames of clips among it."""
    memory = WORLD.scenes("memory", *world_config.SEEN)
    monkeypatch.setattr(run_folder.Run, "manifest", lambda run, name: name == "memory")
    monkeypatch.setattr(build_memory, "open_memory", lambda run, version: range(len(memory)))
    monkeypatch.setattr(build_memory, "is_given", lambda run: False)
    run = run_folder.Run(epath.Path(tmp_path))
    whole = training_documents.collect(WORLD, run, 10**4, 10**4, None)
    assert len(whole.memory) == len(memory) and len(whole.clips) == len(whole.pairs)
    read: set[int] = set()

    class Recorded:
        def take(self, numbers):
            read.update(numbers[numbers >= 0].tolist())
            return np.zeros((*numbers.shape, 1), np.float16)

    rng = np.random.default_rng(0)
    neighbors = rng.integers(len(memory), size=(len(whole.pairs), 3, 2)).astype(np.int32)
    maker = RowMaker(lambda text: [1] * len(text.split()), SlotTokens(2, 3, 4, 5, 6, 7), 2, 32)
    mixture = MixtureConfig(pairs=1, stories=1, clips=2, texts=1)
    source = RowSource(InterleavedConfig(mixture), whole, neighbors, maker, Recorded(), "tokens")
    for _ in zip(source.batches(8, 0), range(200), strict=False):
        pass
    frames = {number for clip in whole.clips for number in clip[1:]}
    assert len(read & frames) > 0.8 * len(frames) and len(read) > 0.8 * len(whole.album)
    shown = {whole.album.pixels(number).tobytes() for number in read}
    for names in (world_config.SEEN, world_config.HELD_OUT):
        test = WORLD.scenes("test", *names)
        assert not shown & {test.image(i).tobytes() for i in range(len(test))}


def test_no_story_shows_a_test_scene_and_each_sentence_tells_the_change(documents):
    test = WORLD.scenes("test", *world_config.SEEN)
    tested = {test.facts(i) for i in range(len(test))}
    assert len(documents.stories) == 40
    for story in documents.stories[:10]:
        facts = read(documents, story[1::2])
        assert len(facts) in (2, 3, 4) and not tested & set(facts)
        for sentence, before, after in zip(story[2::2], facts, facts[1:], strict=False):
            place = emoji_scenes.place(after.entities[0], WORLD.geometry)
            is_move = before.color == after.color
            assert sentence.endswith(f"moves to the {place}" if is_move else after.color)


def test_a_clip_has_its_frames_in_the_order_that_its_caption_tells(documents):
    assert len(documents.clips) == 12
    for caption, *numbers in documents.clips:
        assert len(numbers) == 8
        direction = scene_clips.direction_of(read(documents, numbers))
        assert f"moving {direction} on a" in caption


def test_equal_pictures_have_one_number(documents):
    # Stories move within the scenes of a class, so most of their pictures are shared.
    shown = {number for story in documents.stories for number in story[1::2]}
    pixels = {documents.album.pixels(number).tobytes() for number in shown}
    assert len(pixels) == len(shown)


def test_further_documents_are_read_in_their_order_with_fitted_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(image_files.encode_png(pixels))
    lines = [
        {"id": "d", "segments": [{"text": "x"}, {"image": "a.png"}, {"text": "y"}]},
        {"id": "bad", "segments": []},
    ]
    (tmp_path / sources.CAPTIONS).write_text("\n".join(map(json.dumps, lines)))
    run = run_folder.Run(epath.Path(tmp_path / "run"))
    found = training_documents.collect(WORLD, run, 0, 0, str(tmp_path))
    ((before, number, after),) = found.documents
    assert (before, after) == ("x", "y") and found.album.pixels(number).shape == (32, 32, 3)
    # Another document of the same id has its own picture.
    (tmp_path / "b.png").write_bytes(image_files.encode_png(255 - pixels))
    other = {"id": "d", "segments": [{"image": "b.png"}]}
    text = "\n".join(json.dumps(each) for each in (lines[0], other))
    (tmp_path / sources.CAPTIONS).write_text(text)
    found = training_documents.collect(WORLD, run, 0, 0, str(tmp_path))
    first, second = (found.album.pixels(i) for i in (found.documents[0][1], found.documents[1][0]))
    np.testing.assert_array_equal(second, 255 - first)
    (tmp_path / sources.CAPTIONS).write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match="has no good record; the first bad one is"):
        training_documents.collect(WORLD, run, 0, 0, str(tmp_path))


def test_captions_are_judged_part_by_part():
    scenes = WORLD.scenes("test", *world_config.TEST)
    wanted, facts, level = scenes.full_caption(0), scenes.facts(0), scenes.levels[0]
    name, rest = wanted.split(" at the ")
    place, color = rest.removesuffix(" background").split(" on a ")
    judge = lambda text: text_figures.judge(text, facts, level, wanted)
    assert judge(wanted) == dict.fromkeys(("exact", "named", "place", "color"), True)
    other = "red" if color != "red" else "blue"
    changed = judge(f"{name} at the {place} on a {other} background")
    assert changed == {"exact": False, "named": True, "place": True, "color": False}
    changed = judge(f"no such thing at the center on a {color} background")
    assert changed == {"exact": False, "named": False, "place": False, "color": True}
    assert not any(judge("a picture").values())


@pytest.mark.parametrize("level", list(emoji_scenes.LEVELS))
def test_captions_of_every_level_are_judged(level):
    world = dataclasses.replace(WORLD, levels=(level,))
    scenes = world.scenes("test", *world_config.TEST)
    for i in range(len(scenes)):
        wanted, facts = scenes.full_caption(i), scenes.facts(i)
        judge = functools.partial(
            text_figures.judge, facts=facts, level=scenes.levels[i], wanted=wanted
        )
        assert judge(wanted) == dict.fromkeys(("exact", "named", "place", "color"), True)
        # The last entity elsewhere, or another: right is what is right of all.
        first, last = wanted.rsplit(" the ", 1)
        place, rest = last.split(" on a ")
        other = "top" if place != "top" else "bottom"
        moved = judge(f"{first} the {other} on a {rest}")
        assert moved == {"exact": False, "named": True, "place": False, "color": True}
        fewer = "thing at the center on a red background"
        if len(facts.entities) == 2:
            assert not any(judge(fewer)[name] for name in ("exact", "named", "place", "color"))


def test_shuffled_frames_are_neither_in_order_nor_reversed():
    rng = np.random.default_rng(0)
    orders = [tuple(text_figures._other_order(3, rng)) for _ in range(60)]
    assert set(orders) == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)}


def test_a_scene_of_the_memory_has_its_first_caption():
    album, memory = Album(), WORLD.scenes("memory", *world_config.TEST)
    caption, number = training_documents.scene_row(album, memory, 2)
    assert caption == memory[2].text
    np.testing.assert_array_equal(album.pixels(number), memory.image(2))
