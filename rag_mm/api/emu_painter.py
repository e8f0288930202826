"""The visual decoder beside an imported Emu: Stable Diffusion's U-Net and autoencoder."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from rag_mm.convert import shards, stable_diffusion_format, table, weights
from rag_mm.core import batches, configuration, files, renames
from rag_mm.core.errors import UserError
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.visual_decoder import VisualDecoder, VisualDecoderConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages.shared import frozen

FAMILIES = {each.name: each for each in (stable_diffusion_format.UNET, stable_diffusion_format.VAE)}
# Which part of a `VisualDecoder` each is.
_PLACES = {"unet": "network", "vae": "vae"}
_ONE_FILE = 1 << 62
_AT_ONCE = 4  # Images drawn at once.


@dataclasses.dataclass(frozen=True)
class OpenPart:
    """A U-Net or autoencoder that passed all checks.

    Attributes:
        family: one of `FAMILIES`.
        config: its sizes.
        specs: its tensors by name.
        mappings: from them to our parameters.
        folder: where it is.
    """

    family: table.Family
    config: Any
    specs: Mapping[str, shards.TensorSpec]
    mappings: list[table.TensorMapping]
    folder: pathlib.Path

    def num_bytes(self, dtype: np.dtype | None) -> int:
        """Bytes of its weights in a dtype; None: in the stored one."""
        return weights.num_bytes(weights.stored_shapes(self.mappings, self.specs, dtype))


def open_parts(folder: pathlib.Path, emu: EmuConfig) -> dict[str, OpenPart]:
    """U-Net and autoencoder beside an Emu's weights, by name; {} if there are none.

    Raises:
        UserError: one of them is missing, damaged or not supported, or they do not fit Emu or each other.
    """
    there = [name for name in FAMILIES if (folder / name).is_dir()]
    if not there:
        return {}
    if len(there) < len(FAMILIES):
        raise UserError(f"{folder} has {there[0]} alone; put unet and vae there, or neither.")
    parts = {}
    for name, family in FAMILIES.items():
        own = folder / name
        specs = stable_diffusion_format.open_folder(epath.Path(own))
        config = family.read_config(
            table.CheckpointFolder(files.read_object(own / frozen.CONFIG), specs=specs)
        )
        specs = family.rename(config, specs)
        mappings = weights.check_tensors(family, config, specs)
        parts[name] = OpenPart(family, config, specs, mappings, own)
    make_config(emu, {name: part.config for name, part in parts.items()})
    return parts


def make_config(emu: EmuConfig, configs: Mapping[str, Any]) -> VisualDecoderConfig:
    """The visual decoder of both parts, which draws as the paper's does.

    Raises:
        UserError: the U-Net reads vectors of another width than Emu's codes, or has other latents than the
            autoencoder.
    """
    unet, vae = configs["unet"], configs["vae"]
    if unet.condition_dim != emu.code_dim:
        raise UserError(
            f"The U-Net reads vectors of width {unet.condition_dim:,}, but Emu's codes have "
            f"{emu.code_dim:,}; give the U-Net that was trained for this Emu."
        )
    sizes = VisualDecoderConfig.sd15(emu.num_slots, emu.code_dim)
    try:
        return dataclasses.replace(sizes, unet=unet.unet, vae=vae)
    except ValueError as error:
        raise UserError(f"unet and vae do not fit each other: {error}.") from None


def write_parts(
    parts: Mapping[str, OpenPart], target: pathlib.Path, dtype: np.dtype | None
) -> None:
    """Writes a folder of each part, which `load` and `export_parts` read."""
    for name, part in parts.items():
        values = renames.to_stored(dataclasses.asdict(part.config))
        files.write_json(target / name / frozen.CONFIG, values)
        path = epath.Path(target / name / frozen.PARAMS)
        weights.write_file(path, part.mappings, part.specs, dtype)


def export_parts(source: pathlib.Path, folder: epath.Path, dtype: np.dtype | None) -> None:
    """Writes the parts of an imported run, if it has any, as diffusers would: one file of weights each."""
    for name, config in _configs(source).items():
        family, specs = FAMILIES[name], shards.read_header(source / name / frozen.PARAMS)
        own = folder / name
        own.mkdir(parents=True)
        _write_one_file(own, family.mappings(config), specs, dtype)
        (own / shards.FILE).rename(own / stable_diffusion_format.WEIGHTS)
        files.write_json(own / frozen.CONFIG, family.write_config(config))


def _write_one_file(
    folder: epath.Path,
    mappings: Sequence[weights.TensorMapping],
    specs: Mapping[str, shards.TensorSpec],
    dtype: np.dtype | None,
) -> None:
    def dtype_of(mapping: weights.TensorMapping) -> np.dtype:
        return dtype or shards.DTYPES[specs[mapping.ours].dtype]

    def read(mapping: weights.TensorMapping) -> np.ndarray:
        return weights.read_mapped(specs, mapping)

    weights.write_shards(folder, mappings, dtype_of, read, _ONE_FILE)


@dataclasses.dataclass(frozen=True, eq=False)
class EmuPainter:
    """Draws images of an imported Emu's codes.

    Attributes:
        config: sizes, and how it draws unless told otherwise.
        graphdef, params: structure and parameters, the null condition among them.
    """

    config: VisualDecoderConfig
    graphdef: nnx.GraphDef
    params: Params

    def draw(
        self,
        codes: np.ndarray,
        seed: int = 0,
        guidance: float | None = None,
        num_steps: int | None = None,
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] of codes float32 [B, N, R].

        Args:
            codes: from `ImportedEmu.imagine`.
            seed: of the noise, at least 0.
            guidance: scale of classifier-free guidance; 1: none; None: the paper's 5.
            num_steps: of the sampler; None: the paper's 50.

        Raises:
            UserError: an argument is out of range.
        """
        if seed < 0 or not 0 <= (guidance or 0) < math.inf:
            raise UserError(f"seed={seed}, guidance={guidance}: give finite numbers from 0.")
        most = self.config.noise.num_train_steps - 1
        if num_steps is not None and not 1 <= num_steps <= most:
            raise UserError(f"num_steps is {num_steps}; give 1 to {most}.")
        seeds = np.random.default_rng(seed).integers(1 << 32, size=len(codes), dtype=np.uint32)
        drawn = [
            np.asarray(
                visual_decoder.draw(
                    self.params,
                    codes[rows],
                    seeds[rows],
                    graphdef=self.graphdef,
                    config=self.config,
                    guidance=guidance,
                    num_steps=num_steps,
                )
            )
            for rows in batches.split(len(codes), _AT_ONCE)
        ]
        return np.concatenate(drawn)[: len(codes)]


def load(folder: pathlib.Path, emu: EmuConfig) -> EmuPainter | None:
    """The visual decoder of an imported run in float32, or None if it has none; its null condition is 0.

    Args:
        folder: with the folders of both parts.
        emu: sizes of its Emu.

    Raises:
        UserError: a file is missing or damaged.
    """
    configs = _configs(folder)
    if not configs:
        return None
    config = make_config(emu, configs)
    params: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        path, abstract = (
            epath.Path(folder / name / frozen.PARAMS),
            family.describe(configs[name])[1],
        )
        params[_PLACES[name]] = weights.load_file(path, abstract, np.dtype(np.float32))
    shape = (config.num_slots, config.condition_dim)
    params["statistics"] = {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32)}
    params["null"] = np.zeros(shape, np.float32)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: VisualDecoder(config, rngs=nnx.Rngs(0))))
    return EmuPainter(config, graphdef, params)


def _configs(folder: pathlib.Path) -> dict[str, Any]:
    """Our configs of the parts in an imported run; {} if it has none."""
    found: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        path = folder / name / frozen.CONFIG
        if path.exists():
            values = renames.from_stored(files.read_object(path))
            found[name] = configuration.make(family.config_class, values, str(path))
    return found
