"""A saved visual decoder: the same after loading, and an image depends on its own codes and place alone."""

import functools

import numpy as np
import pytest
from etils import epath

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.dit import DiTConfig
from rag_mm.models.emu.visual_decoder import VisualDecoderConfig
from rag_mm.nn import param_trees
from rag_mm.stages.emu import saved_visual

DIT = DiTConfig(8, patch_size=4, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16)
CODES = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
NULL = np.full((2, 6), 0.5, np.float32)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """An untrained one, whose output is not the zeros that it starts with."""
    folder = epath.Path(tmp_path_factory.mktemp("visual"))
    config = VisualDecoderConfig(2, 6, DIT, num_steps=2)
    make = functools.partial(saved_visual.make_model, config, 0)
    params = visual_decoder.fit(param_trees.init_params(make, sharding.make_mesh()), CODES, NULL)
    network = params["network"]
    kernel = np.random.default_rng(1).normal(size=network["output"]["kernel"].shape)
    output = network["output"] | {"kernel": 0.3 * kernel.astype(np.float32)}
    params = params | {"network": network | {"output": output}}
    saved_visual.save(folder, config, params)
    loaded = saved_visual.load(folder)
    assert loaded.config == config
    return loaded


def test_the_null_condition_is_kept(decoder):
    np.testing.assert_array_equal(decoder.null, NULL)


def test_an_image_depends_on_its_own_codes_and_place(decoder):
    drawn = decoder.draw(CODES, 3)
    assert drawn.dtype == np.uint8 and drawn.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(decoder.draw(CODES[:2], 3), drawn[:2])
    changed = decoder.draw(np.concatenate([CODES[:4], -CODES[4:]]), 3)
    np.testing.assert_array_equal(changed[:4], drawn[:4])
    assert (changed[4] != drawn[4]).any()
    assert (decoder.draw(CODES, 4) != drawn).any((1, 2, 3)).all()


def test_without_guidance_the_null_condition_draws_as_any_other(decoder):
    nothing = np.repeat(NULL[None], 2, axis=0)
    plain = decoder.draw(nothing, 0, guidance=1.0)
    # Away from itself is nowhere.
    np.testing.assert_allclose(decoder.draw(nothing, 0, guidance=3.0), plain, atol=1)
    assert (decoder.draw(CODES, 0, guidance=3.0) != decoder.draw(CODES, 0, guidance=1.0)).any()
    assert (decoder.draw(CODES, 0, steps=4) != decoder.draw(CODES, 0, steps=2)).any()


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (CODES[:, :, :5], {}, "from 2 vectors of width 6 an image, but is given 2 x 5"),
        (CODES, {"guidance": -1.0}, "guidance is -1.0"),
        (CODES, {"guidance": float("nan")}, "guidance is nan"),
        (CODES, {"steps": 0}, "steps is 0; give 1 to 1,000"),
    ],
)
def test_bad_requests_are_one_sentence(decoder, codes, options, message):
    with pytest.raises(UserError, match=message):
        decoder.draw(codes, 0, **options)
