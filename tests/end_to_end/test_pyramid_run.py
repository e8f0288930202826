"""A pyramid of three grids and images of two sizes, through every stage, command and task."""

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core import code_grids, files
from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.decode import sampler, tasks

PROMPT = "red apple at the top left on a blue background"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid") / "run"
    words = [
        "train",
        "--config=configs/quickstart.py:tiny",
        f"--workdir={folder}",
        "--config.tokenizer.model.levels=(2, 4, 8)",
        "--config.tokenizer.image_sizes=(32, 16)",
    ]
    assert main.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return rag_mm.load(str(workdir))


def test_it_is_evaluated_to_the_last_figure(workdir):
    measured = files.read_json(workdir / "metrics.json")
    for count in range(3):
        assert np.isfinite(measured["decoder"]["art_nll"][f"docs{count}"]["mean"])
    assert (workdir / "report.html").exists()


def test_images_of_two_sizes_come_from_one_decoder(run):
    assert run.image_tokenizer.grids == ((2, 2), (4, 4), (8, 8))
    for options, side in (({}, 32), ({"image_size": 32}, 32), ({"image_size": 16}, 16)):
        drawn = run.generate(PROMPT, num=2, best_of=2, **options)
        assert drawn.images.shape == (2, side, side, 3)
    default, named = (run.generate(PROMPT, **o).images for o in ({}, {"image_size": 32}))
    np.testing.assert_array_equal(default, named)
    with pytest.raises(UserError, match="64 is none of the model's; give 32, 16"):
        run.generate(PROMPT, image_size=64)


def test_a_band_is_filled_in_every_grid_and_nothing_else_changes(run):
    image = run.memory.document(0).image
    before = run.image_tokenizer.encode(image[None])[0]
    holes = code_grids.ranges_of_rows(run.image_tokenizer.grids, 32, 8, 24)
    assert len(holes) == 3
    main = token_documents.pair([5], before)
    seeds, warm = np.arange(4, dtype=np.uint32), sampler.Sampling(1.0)
    after = tasks.infill_codes(run.generator, [main] * 4, holes, [[]] * 4, seeds, warm).codes
    inside = np.zeros(84, bool)
    for start, end in holes:
        inside[start:end] = True
        assert (after[:, start:end] != after[:1, start:end]).any()
    np.testing.assert_array_equal(after[:, ~inside], np.tile(before[~inside], (4, 1)))
    assert run.infill(image, PROMPT, band=(8, 24), num=2).images.shape == (2, 32, 32, 3)
    caption = run.caption(image, num=1).captions[0]
    assert isinstance(caption, str)


def test_the_command_draws_the_small_size(workdir, tmp_path):
    out = tmp_path / "small.png"
    words = ["generate", f"--workdir={workdir}", f"--prompt={PROMPT}", f"--out={out}"]
    assert main.main([*words, "--image-size=16"]) == 0
    assert PIL.Image.open(out).size == (16, 16)
    assert main.main([*words, "--image-size=20"]) == 2
