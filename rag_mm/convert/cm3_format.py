"""Decoders trained here (CM3, RA-CM3) as safetensors under their own names, and the table of these.

Names are paths in the model. A stack's parameter is written layer by layer, `{}` counting layers; every array
has the shape that it has here, whose axes the table names.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from rag_mm.convert.table import CheckpointFolder, Family, Rule
from rag_mm.core.errors import UserError
from rag_mm.nn.decoder import Decoder, DecoderConfig

_STACK = "stack/blocks/"


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Every field of the decoder's config."""
    return {"model_type": "rag_mm_decoder", **dataclasses.asdict(config)}


def rules(config: DecoderConfig) -> list[Rule]:
    """Every parameter under its own path, `stack.{}.mlp.up.kernel`."""
    return [Rule(path, _outside(path)) for path in _axes(config)]


def name_table(config: DecoderConfig) -> dict[str, Any]:
    """What a reader of the file needs: name, shape and axes of every parameter, {} counting layers.

    A kernel maps its first axes to its last ones: q [embed, heads, head_dim], out [heads, head_dim, embed].
    """
    rows = {}
    for path, (shape, axes) in _axes(config).items():
        is_stacked = path.startswith(_STACK)
        rows[_outside(path)] = {
            "shape": list(shape[1:] if is_stacked else shape),
            "axes": [axis or _unsplit_axis(path) for axis in axes],
            "layers": shape[0] if is_stacked else None,
        }
    return rows


def _outside(path: str) -> str:
    name = path.replace("/", ".")
    return name.replace("stack.blocks.", "stack.{}.", 1) if path.startswith(_STACK) else name


def _axes(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of every parameter by path; those of a layer do not name `layers`."""
    abstract = nnx.split(jax.eval_shape(lambda: _make_model(config)), nnx.Param)[1]
    return {
        "/".join(map(str, path)): (variable.get_value().shape, variable.get_metadata()["axes"])
        for path, variable in abstract.flat_state()
    }


def _unsplit_axis(path: str) -> str:
    # Axes that no mesh ever splits have no logical name.
    return "head_dim" if "attention/" in path else "embed"


def _read_config(outside: CheckpointFolder) -> DecoderConfig:
    raise UserError("Decoders trained here are exported, not imported; use their run.")


def _make_model(config: DecoderConfig) -> nnx.Module:
    return Decoder(config, rngs=nnx.Rngs(params=0))


FAMILY = Family("cm3", DecoderConfig, _read_config, write_config, _make_model, rules)
