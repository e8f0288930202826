"""Decoders trained here (CM3, RA-CM3, CM3Leon) as safetensors, with a table of tensor names and axes.

Names are paths in the model. Stacked parameters are written layer by layer, with the layer in place of `{}`;
every array keeps the shape of our parameter.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from rag_mm.convert.table import CheckpointFolder, Family, Rule
from rag_mm.core import configuration
from rag_mm.nn.decoder import Decoder, DecoderConfig

_STACK = "stack/blocks/"
_MODEL_TYPE = "rag_mm_decoder"
NAMES = "names.json"  # The file of `name_table`.


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Every field of the decoder's config."""
    return {"model_type": _MODEL_TYPE, **dataclasses.asdict(config)}


def rules(config: DecoderConfig) -> list[Rule]:
    """Every parameter under its path with dots, `stack.{}.mlp.up.kernel`."""
    return [Rule(path, _tensor_name(path)) for path in _axes(config)]


def name_table(config: DecoderConfig) -> dict[str, Any]:
    """Shape, axes and number of layers of every tensor by name, where `{}` stands for the layer.

    A kernel maps its first axes to its last ones: q [embed, heads, head_dim], out [heads, head_dim, embed].
    """
    entries = {}
    for path, (shape, axes) in _axes(config).items():
        is_stacked = path.startswith(_STACK)
        entries[_tensor_name(path)] = {
            "shape": list(shape[1:] if is_stacked else shape),
            "axes": [axis or _unsplit_axis(path) for axis in axes],
            "layers": shape[0] if is_stacked else None,
        }
    return entries


def _tensor_name(path: str) -> str:
    name = path.replace("/", ".")
    return name.replace("stack.blocks.", "stack.{}.", 1) if path.startswith(_STACK) else name


def _axes(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of every parameter by path; the axes leave out `layers`."""
    abstract = nnx.split(jax.eval_shape(lambda: _make_model(config)), nnx.Param)[1]
    return {
        "/".join(map(str, path)): (variable.get_value().shape, variable.get_metadata()["axes"])
        for path, variable in abstract.flat_state()
    }


def _unsplit_axis(path: str) -> str:
    # Axes that are never sharded have no logical name.
    return "head_dim" if "attention/" in path else "embed"


def _read_config(checkpoint: CheckpointFolder) -> DecoderConfig:
    """Every field of the decoder's config, as `write_config` writes them."""
    others = ("model_type", "torch_dtype")
    values = {key: value for key, value in checkpoint.config.items() if key not in others}
    return configuration.make(DecoderConfig, values, "config.json")


def _make_model(config: DecoderConfig) -> nnx.Module:
    return Decoder(config, rngs=nnx.Rngs(params=0))


FAMILY = Family(
    "cm3",
    DecoderConfig,
    _read_config,
    write_config,
    _make_model,
    rules,
    model_types=(_MODEL_TYPE,),
)
