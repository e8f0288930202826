"""VGG16 as the tower of the perceptual loss: torch's layers with the same weights give the same features."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from rag_mm.convert import vgg16_format
from rag_mm.core.errors import UserError
from rag_mm.models.spae import perceptual
from rag_mm.nn import param_trees
from rag_mm.stages.spae import added_losses

# torchvision.models.vgg.cfgs["D"]; M is a max pooling.
LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
TAPS = (3, 8, 15, 22, 29)  # the last activation before each pooling


def make_model():
    return perceptual.VGG16(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def peer():
    """torchvision's `features` with random weights, that keep the variance of activations."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers, width = [], 3
    for entry in LAYOUT:
        if entry == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
            continue
        layers += [torch.nn.Conv2d(width, entry, 3, padding=1), torch.nn.ReLU()]
        torch.nn.init.kaiming_normal_(layers[-2].weight)
        torch.nn.init.normal_(layers[-2].bias, std=0.1)
        width = entry
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def file(peer, tmp_path_factory):
    tensors = {f"features.{name}": value.numpy() for name, value in peer.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    safetensors.numpy.save_file(tensors | {"classifier.6.bias": np.zeros(1000, np.float32)}, path)
    return path


@pytest.mark.parity
def test_features_are_those_of_torch(peer, file):
    import torch

    graphdef, abstract = param_trees.describe(make_model, None)
    params = vgg16_format.load(file, abstract)
    images = np.random.default_rng(0).uniform(size=(2, 32, 48, 3)).astype(np.float32)
    ours = jax.jit(lambda p, x: nnx.merge(graphdef, p).features(x))(params, images)
    mean, std = (np.float32(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, theirs = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2), []
    with torch.no_grad():
        for place, layer in enumerate(peer):
            x = layer(x)
            if place in TAPS:
                theirs.append(x.permute(0, 2, 3, 1).numpy())
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parity
def test_a_stage_takes_the_file_and_knows_it_by_its_content(file, tmp_path):
    weights = added_losses.LossWeights(perceptual=0.1)
    config = added_losses.AddedLossesConfig(folder=str(file), weights=weights)
    assert len(config.folder_fingerprint) == 64 and not config.needs_retriever
    tensors = safetensors.numpy.load_file(file)
    tensors["features.28.bias"] = tensors["features.28.bias"][:-1]
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(tensors, other)
    with pytest.raises(UserError, match=r"features.28.bias should hold floats of shape \[512\]"):
        added_losses.AddedLossesConfig(folder=str(other), weights=weights)
