"""Prints, as JSON, what calls of annotated functions cost and check without the import hook of tests."""

import json
import sys

import jax.numpy as jnp

from rag_mm.decode import cache
from rag_mm.models import reco
from rag_mm.nn import conv
from rag_mm.ops import images

FUNCTIONS = (images.to_uint8, conv.average_pool, reco.mean_fusion, cache.make_attend)

pooled = conv.average_pool(jnp.ones((1, 4, 4, 3), jnp.int32))  # The annotation says Float.
print(
    json.dumps(
        {
            "shape": pooled.shape,
            "files": [function.__code__.co_filename for function in FUNCTIONS],
            "has_checker": "beartype" in sys.modules,
        }
    )
)
