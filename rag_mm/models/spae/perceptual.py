"""The perceptual loss: the distance of a frozen tower's features of an image and its reconstruction.

Features are compared as in LPIPS without its learned weights (Zhang et al. 2018, section 3): each position's
vector is scaled to length 1, and squared distances are averaged over positions and layers. The tower is
torchvision's VGG16, or a CLIP's image tower. Its parameters lie in the model under `perceptual/`, where the
stage holds them frozen.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from rag_mm.core.errors import UserError
from rag_mm.models import clip
from rag_mm.nn import conv

_WIDTHS = (64, 128, 256, 512, 512)
_CONVS = (2, 2, 3, 3, 3)  # convolutions of each width, with a pooling between the widths
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_EPS = 1e-10


class VGG16(nnx.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015), `features` of torchvision's."""

    def __init__(self, *, rngs: nnx.Rngs):
        previous, convs = 3, []
        for width, count in zip(_WIDTHS, _CONVS, strict=True):
            for _ in range(count):
                convs.append(conv.conv3x3(previous, width, rngs=rngs))
                previous = width
        self.convs = nnx.List(convs)

    def features(self, images: Float32[Array, "B H W 3"]) -> list[Float32[Array, "B h w D"]]:
        """The last activations before each of the five poolings: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

        Raises:
            UserError: height or width is no multiple of 16.
        """
        height, width = images.shape[1:3]
        if height % 16 or width % 16:
            raise UserError(
                f"VGG16 compares images of a multiple of 16 pixels, not {height} x {width}; use the run's "
                "retriever, or other crops."
            )
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (_MEAN, _STD))
        h, found, convs = (images - mean) / std, [], iter(self.convs)
        for group, count in enumerate(_CONVS):
            if group:
                h = _max_pool(h)
            for _ in range(count):
                h = jax.nn.relu(next(convs)(h))
            found.append(h)
        return found


def _max_pool(x: Float32[Array, "B H W D"]) -> Float32[Array, "B H//2 W//2 D"]:
    b, h, w, d = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, d).max(axis=(2, 4))


class CLIPFeatures(nnx.Module):
    """A CLIP's image tower: the tokens after each of its blocks, of images scaled to its size."""

    def __init__(self, config: clip.CLIPConfig, *, rngs: nnx.Rngs):
        self.vision = clip.VisionTower(config, rngs=rngs)

    def features(self, images: Float32[Array, "B H W 3"]) -> list[Float32[Array, "B T D"]]:
        """For each block T tokens, the class token first."""
        size = self.vision.config.image_size
        if images.shape[1:3] != (size, size):
            shape = (images.shape[0], size, size, 3)
            images = jax.image.resize(images, shape, "bilinear")
        return self.vision.tokens_by_layer(images)


def perceptual_term(
    tower: VGG16 | CLIPFeatures,
    images: Float32[Array, "B H W 3"],
    reconstruction: Float32[Array, "B H W 3"],
) -> Float32[Array, ""]:
    """Mean squared distance of unit feature vectors, in 0..4, averaged over layers.

    Args:
        tower: the frozen network, whose parameters get no gradient.
        images: in 0..1; constants of the loss.
        reconstruction: their reconstructions, which may leave that range.
    """
    tower = jax.lax.stop_gradient(tower)
    wanted = jax.lax.stop_gradient(tower.features(images))
    found = tower.features(reconstruction)
    distances = [
        jnp.mean(jnp.sum((_unit(a) - _unit(b)) ** 2, axis=-1))
        for a, b in zip(wanted, found, strict=True)
    ]
    return jnp.mean(jnp.stack(distances))


def _unit(x: Float32[Array, "*shape D"]) -> Float32[Array, "*shape D"]:
    # The square root of zero has no finite gradient.
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + _EPS)
