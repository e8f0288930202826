"""The FID's Inception: features as pytorch-fid's with the same random weights, and files that are none."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rag_mm.convert import inception_format
from rag_mm.core.errors import UserError
from rag_mm.models import inception

# Widths of the convolutions by name, and every 32nd feature of pytorch-fid 0.3.0 for the weights and the
# pictures below.
GOLDEN = json.loads(
    (pathlib.Path(__file__).parent.parent / "parity/golden/inception.json").read_text()
)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, np.float32)
    if len(shape) == 4:
        return values * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    if name.endswith("running_var"):
        return np.abs(values) + np.float32(0.5)
    return values * np.float32(0.1) + np.float32(name.endswith("weight"))


def make_tensors() -> dict[str, np.ndarray]:
    """Tensors of the published sizes, drawn by their names."""
    tensors = {}

    def convolve(name, x, kernel, stride, padding):
        width = GOLDEN["widths"][name]
        shapes = {"conv.weight": (width, x.shape[-1], *kernel)}
        shapes |= {
            f"bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")
        }
        own = {f"{name}.{key}": draw(f"{name}.{key}", shape) for key, shape in shapes.items()}
        tensors.update(own)
        with_own = inception.convolve_with(jax.tree.map(jnp.asarray, own))
        return with_own(name, x, kernel, stride, padding)

    run = lambda images: inception.features(convolve, images)
    jax.eval_shape(run, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return tensors


@pytest.mark.slow
def test_features_are_those_of_pytorch_fid(tmp_path):
    extra = {"fc.weight": np.ones((3, 2048), np.float32)}  # The classifier is left out.
    safetensors.numpy.save_file(make_tensors() | extra, tmp_path / "inception.safetensors")
    tensors = inception_format.load(tmp_path / "inception.safetensors")
    assert len(tensors) == 5 * len(GOLDEN["widths"])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3)).astype(np.uint8)
    see = jax.jit(lambda t, x: inception.features(inception.convolve_with(t), x))
    found = see(tensors, pictures / np.float32(255))
    np.testing.assert_allclose(found[:, ::32], GOLDEN["features"], atol=2e-4)


@pytest.mark.parametrize(
    "tensors",
    [
        {"features.0.weight": np.ones((4, 3, 3, 3), np.float32)},
        {"Conv2d_1a_3x3.conv.weight": np.ones((4, 3, 5, 5), np.float32)},
    ],
    ids=["another network", "another kernel"],
)
def test_other_weights_are_refused(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold the Inception of the FID"):
        inception_format.load(tmp_path / "a.safetensors")
