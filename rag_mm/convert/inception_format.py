"""pytorch-fid's Inception weights as safetensors, for `models.inception`."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rag_mm.convert import shards
from rag_mm.core.errors import UserError
from rag_mm.models import inception

_UNUSED = ("fc.", "AuxLogits.")  # The classifiers.
_COUNT = "num_batches_tracked"


def load(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of the convolutions and their norms, float32, by name.

    Args:
        path: a safetensors file of `pt_inception-2015-12-05-6726825d.pth`.

    Raises:
        UserError: the file is damaged, or lacks a tensor, or one has another shape or dtype.
    """
    specs = shards.read_header(epath.Path(path))
    found = {
        name: shards.read_tensor(spec).astype(np.float32)
        for name, spec in specs.items()
        if not name.startswith(_UNUSED)
        and not name.endswith(_COUNT)
        and spec.dtype in shards.DTYPES
    }
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    run = lambda tensors, x: inception.features(inception.convolve_with(tensors), x)
    try:
        jax.eval_shape(run, found, image)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold the Inception of the FID ({str(error).splitlines()[0][:120]}); convert "
            "pt_inception-2015-12-05-6726825d.pth to safetensors."
        ) from None
    return found
