"""torchvision's VGG16 as safetensors, `features.N.weight` and `features.N.bias`, for `perceptual.VGG16`."""

import jax
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.convert import shards
from rag_mm.core.errors import UserError
from rag_mm.models.spae import perceptual
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params

# Places of the convolutions in torchvision's `features`, which also counts activations and poolings.
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_PARTS = {"kernel": "weight", "bias": "bias"}


def check(path: epath.PathLike) -> dict[str, shards.TensorSpec]:
    """The tensors of a file by the paths of our parameters.

    Args:
        path: a safetensors file of torchvision's vgg16, with or without its classifier.

    Raises:
        UserError: the file is damaged, lacks a convolution, or holds one of another shape.
    """
    abstract = param_trees.describe(lambda: perceptual.VGG16(rngs=nnx.Rngs(0)), None)[1]
    specs, found = shards.read_header(epath.Path(path)), {}
    for ours, leaf in param_trees.leaves_by_path(abstract).items():
        _, number, part = ours.split("/")
        theirs = f"features.{_PLACES[int(number)]}.{_PARTS[part]}"
        shape = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if part == "kernel" else leaf.shape
        spec = specs.get(theirs)
        if spec is None or spec.dtype not in shards.DTYPES or spec.shape != shape:
            has = "lacks it" if spec is None else f"has {spec.dtype} {list(spec.shape)}"
            raise UserError(
                f"{path} is no VGG16 of torchvision: {theirs} should hold floats of shape {list(shape)}, "
                f"but the file {has}."
            )
        found[ours] = spec
    return found


def load(path: epath.PathLike, abstract: Params) -> Params:
    """The parameters of a `perceptual.VGG16` in the shardings of `abstract`, float32.

    Args:
        path: see `check`, which says what is raised.
        abstract: shapes with shardings, from `param_trees.describe`.
    """
    specs, made = check(path), []
    for ours, leaf in param_trees.leaves_by_path(abstract).items():
        tensor = shards.read_tensor(specs[ours]).astype(np.float32)
        if tensor.ndim == 4:  # [out, in, rows, columns] there
            tensor = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
        made.append(jax.device_put(tensor, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), made)
