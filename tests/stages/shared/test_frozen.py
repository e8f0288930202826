"""Frozen models stand alone: what they are is decided by their files' content, wherever these lie."""

import shutil

import numpy as np
import pytest

from rag_mm.core.errors import UserError
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
