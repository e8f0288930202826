"""Frozen models stand alone: what they are is decided by their files' content, wherever these lie."""

import dataclasses
import shutil

import numpy as np
import pytest
from etils import epath
from flax import nnx

from rag_mm.core import code_grids
from rag_mm.core.errors import UserError
from rag_mm.data import vocabulary
from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.stages.shared import frozen


@pytest.mark.parametrize(
    ("num_rows", "computed"), [(1, [1]), (3, [4]), (256, [256]), (300, [256, 64])]
)
def test_the_cost_fits_the_request_and_no_padding_is_left(num_rows, computed):
    sizes = []

    def double(batch):
        sizes.append(len(batch))
        return batch * 2

    rows = np.arange(2 * num_rows).reshape(num_rows, 2)
    np.testing.assert_array_equal(frozen.in_batches(double, rows, batch_size=256), rows * 2)
    assert sizes == computed


def test_the_batch_can_be_chosen(tiny_run):
    """By default it is that of the image size, 256 for 32 pixels."""
    for kind, name in (
        (frozen.FrozenRetriever, "retriever"),
        (frozen.FrozenTokenizer, "tokenizer"),
    ):
        folder = tiny_run.workdir / name / "frozen"
        assert (kind(folder).image_batch, kind(folder, image_batch=2).image_batch) == (256, 2)
    chosen = kind(folder, image_batch=2)
    sizes, encode = [], chosen._encode
    chosen._encode = lambda batch: sizes.append(len(batch)) or encode(batch)
    assert chosen.encode(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 64)
    assert sizes == [2, 1]


def test_a_copy_is_the_same_model(tiny_run, tmp_path):
    folder = tiny_run.workdir / "retriever" / "frozen"
    copy = shutil.copytree(folder, tmp_path / "copy")
    original, copied = frozen.FrozenRetriever(folder), frozen.FrozenRetriever(copy)
    assert original.fingerprint == copied.fingerprint
    texts = ["red apple", "a green frog on a blue background " * 9]
    np.testing.assert_array_equal(original.encode_text(texts), copied.encode_text(texts))
    np.testing.assert_allclose(
        np.linalg.norm(original.encode_text(texts), axis=1), 1, rtol=0, atol=1e-5
    )


def test_a_row_does_not_depend_on_its_companions(tiny_run):
    tokenizer = frozen.FrozenTokenizer(tiny_run.workdir / "tokenizer" / "frozen")
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    codes = tokenizer.encode(pictures)
    assert codes.shape == (3, 64) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < tokenizer.config.codebook_size
    np.testing.assert_array_equal(tokenizer.encode(pictures[1:2]), codes[1:2])
    assert tokenizer.decode(codes).shape == pictures.shape


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory):
    """Untrained image tokenizers of the same sizes, by their levels; a patch sees nothing but itself."""
    text = vocabulary.train_vocabulary([], 256, 64, 4)
    made = {}
    for levels in ((8,), (4, 8), (2, 4, 8)):
        config = dataclasses.replace(SPAEConfig.tiny(), codebook_size=64, levels=levels)
        model = SPAE(config, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
        folder = epath.Path(tmp_path_factory.mktemp("pyramid"))
        frozen.save_tokenizer(folder, config, text, params)
        made[levels] = frozen.FrozenTokenizer(folder)
    return made


PICTURES = np.random.default_rng(1).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
LEVELS = pytest.mark.parametrize("levels", [(8,), (4, 8), (2, 4, 8)], ids=str)


@LEVELS
def test_the_contract_of_an_image_tokenizer(pyramids, levels):
    tokenizer = pyramids[levels]
    assert tokenizer.grids == tuple((side, side) for side in levels)
    assert (tokenizer.image_size, tokenizer.codebook_size) == (32, 64)
    codes = tokenizer.encode(PICTURES)
    assert codes.shape == (3, tokenizer.num_codes) and codes.dtype == np.int32
    assert tokenizer.num_codes == sum(side**2 for side in levels)
    images = tokenizer.decode(codes)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    first = tokenizer.vocabulary.code_offset
    assert tokenizer.token_ids.tolist() == list(range(first, first + 64))


@LEVELS
@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 48)], ids=str)
def test_images_of_other_sizes_have_grids_in_proportion(pyramids, levels, size):
    """A patch is encoded alone here, so codes of one level are those of the larger image around it."""
    tokenizer = pyramids[levels]
    grids = tokenizer.grids_at(*size)
    shares = {
        (rows * 32 // side, columns * 32 // side)
        for side, (rows, columns) in zip(levels, grids, strict=True)
    }
    assert shares == {size}
    large = np.concatenate([PICTURES, PICTURES[::-1]], axis=2)
    cut = np.ascontiguousarray(large[:, : size[0], : size[1]])
    codes = tokenizer.encode(cut)
    assert codes.shape == (3, code_grids.num_codes(grids))
    assert tokenizer.decode(codes, grids=grids).shape == cut.shape
    if len(levels) == 1:
        rows, columns = grids[-1]
        whole = tokenizer.encode(large).reshape(3, 8, 16)
        np.testing.assert_array_equal(codes.reshape(3, rows, columns), whole[:, :rows, :columns])


def test_the_first_levels_of_codes_decode(pyramids):
    """By their number or by the codes alone, at both sizes; the last one adds to the image."""
    tokenizer = pyramids[2, 4, 8]
    for size in (32, 16):
        pictures = PICTURES[:, :size, :size]
        grids = tokenizer.grids_at(size, size)
        codes, ends = tokenizer.encode(pictures), code_grids.ends(grids)
        drawn = [tokenizer.decode(codes, number, grids) for number in (1, 2, 3)]
        np.testing.assert_array_equal(drawn[2], tokenizer.decode(codes, grids=grids))
        for number in (1, 2):
            prefix = codes[:, : ends[number - 1]]
            np.testing.assert_array_equal(drawn[number - 1], tokenizer.decode(prefix, grids=grids))
            assert (drawn[number - 1] != drawn[number]).any()


def test_what_an_image_tokenizer_refuses(pyramids):
    tokenizer = pyramids[2, 4, 8]
    codes = tokenizer.encode(PICTURES)
    for call, message in (
        (lambda: tokenizer.encode(PICTURES[:, :24]), r"24 x 32 pixels .* multiples of 16"),
        (lambda: tokenizer.grids_at(0, 16), "0 x 16 pixels"),
        (lambda: tokenizer.decode(codes[:, :80]), r"80 codes are not .* \(8, 8\)"),
        (lambda: tokenizer.decode(codes, num_levels=0), "num_levels is 0, .* 1 to 3"),
        (lambda: tokenizer.decode(codes[:, :20], num_levels=3), "num_levels is 3, .* 1 to 2"),
        (lambda: tokenizer.decode(codes, grids=((2, 2), (8, 8))), "has no grids"),
        (lambda: tokenizer.decode(codes, grids=tokenizer.grids_at(16, 16)), "84 codes are not"),
        (lambda: tokenizer.decode(codes + 64), "codebook has 0 to 63; give codes"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_as_many_pixels_at_once_at_any_size(pyramids):
    tokenizer = pyramids[8,]
    sizes, encode = [], tokenizer._encode
    tokenizer._encode = lambda batch: sizes.append(batch.shape[:2]) or encode(batch)
    tokenizer.image_batch = 2
    tokenizer.encode(np.zeros((4, 64, 32, 3), np.uint8))
    tokenizer.encode(np.zeros((4, 16, 32, 3), np.uint8))
    assert sizes == [(1, 64)] * 4 + [(4, 16)]


def test_another_family_is_refused(tiny_run, tmp_path):
    with pytest.raises(UserError, match="family clip"):
        frozen.FrozenRetriever(tiny_run.workdir / "tokenizer" / "frozen")
    with pytest.raises(UserError, match="does not exist"):
        frozen.FrozenTokenizer(tmp_path)


def test_missing_parameters_are_named(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run.workdir / "tokenizer" / "frozen", tmp_path / "copy")
    (copy / frozen.PARAMS).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        frozen.FrozenTokenizer(copy)
