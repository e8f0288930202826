"""The world of the user's own images: its split, its documents, and the mistakes it rejects."""

import json

import numpy as np
import PIL.Image
import pytest

from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.shared import find_neighbors, world_config


@pytest.fixture
def folder(tmp_path):
    """Twenty images of several sizes."""
    return make_folder(tmp_path / "pictures", range(20))


def make_folder(path, numbers, bad=0):
    path.mkdir(exist_ok=True)
    lines = ["{"] * bad
    for i in numbers:
        pixels = np.full((20 + i, 50, 3), 10 * i, np.uint8)
        PIL.Image.fromarray(pixels).save(path / f"own{i}.png")
        lines.append(json.dumps({"image": f"own{i}.png", "caption": f"square number {i}"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def config(folder, **changes):
    overrides = {"world.documents": str(folder), **changes}
    return chain_config.load("configs/own_images.py:tiny", overrides)


def ids(world, role, *splits):
    source = world.scenes(role, *splits)
    return [source[i].id for i in range(len(source))]


def test_a_tenth_is_held_out_and_stays_so(folder):
    world = world_config.make(dict(documents=str(folder)))
    seen, held_out = (
        ids(world, "train", *world_config.SEEN),
        ids(world, "train", *world_config.HELD_OUT),
    )
    assert len(seen) == 18 and len(held_out) == 2
    assert sorted(seen + held_out) == sorted(f"own{i}" for i in range(20))
    assert ids(world, "memory", *world_config.SEEN) == seen
    # More documents are another world, in which few of these have moved.
    make_folder(folder, range(24))
    later = world_config.make(dict(documents=str(folder)))
    assert later != world and later.digest != world.digest
    assert len(set(ids(later, "test", *world_config.HELD_OUT)) & set(held_out)) >= 1
    # And so is another picture under the same name.
    picture = next(folder.glob("*.png"))
    picture.write_bytes(picture.read_bytes() + b" ")
    assert world_config.make(dict(documents=str(folder))).digest != later.digest


def test_half_of_the_held_out_documents_are_for_tuning_and_half_for_tests(folder):
    world = world_config.make(dict(documents=str(folder), held_out_share=0.3))
    tune, test = ids(world, "test", *world_config.TUNE), ids(world, "test", *world_config.TEST)
    assert len(tune) == len(test) == 3
    assert sorted(tune + test) == sorted(ids(world, "memory", *world_config.HELD_OUT))


def test_documents_have_one_caption_and_the_models_size(folder):
    source = world_config.make(dict(documents=str(folder), image_size=16)).scenes("train", "common")
    assert source.image(3).shape == (16, 16, 3)
    assert source.caption(3, 0) == source.caption(3, 1) == source.full_caption(3) == source[3].text
    assert source.entity_mask(3).all() and source.entity_mask(3).shape == (16, 16)


def test_the_page_makes_a_chain_without_the_scorer(folder):
    made = chain_config.stage_configs(config(folder))
    assert list(made) == ["tokenizer", "retriever", "memory", "neighbors", "decoder"]
    assert len({each.world for each in made.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world.documents": ""}, "world: documents is empty"),
        ({"world.held_out_share": "1.0"}, "held_out_share is 1.0"),
        ({"world.image_size": "64"}, "model.image_size is 32"),
        ({"stages": "tokenizer,report"}, "stage report does not support .* have no facts to score"),
        ({"world.documents": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_mistakes(folder, changes, says):
    with pytest.raises(UserError, match=says):
        chain_config.stage_configs(config(folder, **changes))


def test_a_few_bad_records_are_skipped(folder, capsys):
    make_folder(folder, range(20), bad=1)
    assert len(world_config.make(dict(documents=str(folder))).scenes("train", "common")) == 18
    assert "skipped 1 bad records; the first is line 1" in capsys.readouterr().err
    make_folder(folder, range(20), bad=2)
    with pytest.raises(UserError, match="20 valid and 2 bad records"):
        world_config.make(dict(documents=str(folder))).scenes("train", "common")


def test_a_world_of_scenes_needs_no_bound():
    page = chain_config.load("configs/quickstart.py:tiny")
    made = chain_config.stage_configs(page)
    assert isinstance(made["neighbors"], find_neighbors.NeighborsStageConfig)
    assert made["neighbors"].max_similarity is None
