"""The image tokenizer in a checkpoint folder of Chameleon, Janus or Emu3, whole or saved alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from rag_mm.convert import chameleon_format, emu3_format, image_processor, vqgan_format
from rag_mm.convert.table import CheckpointFolder, ConfigReader, Family, Rule, Specs
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, emu3_vq, vqgan

_CODEBOOK = "quantize.embedding.weight"
_ALONE = "_vqgan"  # ends the model_type of an image tokenizer saved alone


@dataclasses.dataclass(frozen=True)
class Source:
    """How one public model stores its image tokenizer; a prefix is that of the tensors' names.

    Attributes:
        stored: the family in our config.json, which is that of the architecture.
        config_class: class of our config.
        make_model: our config to a model.
        read_config: (folder, vq_config, prefix) -> our config.
        rules: (our config, prefix) -> the name table.
        parse_vocabulary_map: token names and ids to the token of each code; None if codes are not tokens of
            the text's vocabulary.
    """

    stored: str
    config_class: type
    make_model: Callable[..., nnx.Module]
    read_config: Callable[[CheckpointFolder, Mapping[str, Any], str], Any]
    rules: Callable[[Any, str], list[Rule]]
    parse_vocabulary_map: Callable[[Mapping[str, int]], tuple[int, ...]] | None


def find(checkpoint: CheckpointFolder) -> tuple[Family, Specs, tuple[int, ...]]:
    """The image tokenizer of a checkpoint folder.

    Returns:
        Its family, whose `read_config` takes the same folder; its tensors by name, without those of the rest
        of the model; and the token of each code, empty where codes are not tokens of the text's vocabulary.

    Raises:
        UserError: there is none, it is of an unknown family, or its tokens are damaged.
    """
    model_type = checkpoint.config.get("model_type")
    name = model_type.removesuffix(_ALONE) if isinstance(model_type, str) else ""
    if name not in SOURCES:
        types = ", ".join(f"{each} or {each}{_ALONE}" for each in SOURCES)
        raise UserError(
            f"config.json: model_type is {model_type!r}; the image tokenizers are those of {types}."
        )
    source, is_whole = SOURCES[name], model_type == name
    values = (checkpoint.config.get("vq_config") or {}) if is_whole else checkpoint.config
    prefix = _find_prefix(checkpoint.specs)
    family = Family(
        name=source.stored,
        config_class=source.config_class,
        read_config=lambda folder: source.read_config(folder, values, prefix),
        write_config=_refuse_to_write,
        make_model=lambda config: source.make_model(config, rngs=nnx.Rngs(0)),
        rules=lambda config: source.rules(config, prefix),
        is_ignored=lambda config, tensor: emu3_format.is_ignored(tensor),
    )
    specs = {tensor: spec for tensor, spec in checkpoint.specs.items() if tensor.startswith(prefix)}
    return family, specs, _read_tokens(source, checkpoint.config) if is_whole else ()


def _find_prefix(specs: Specs) -> str:
    """What precedes the names of the image tokenizer's tensors, such as `model.vqmodel.`."""
    found = [name.removesuffix(_CODEBOOK) for name in specs if f".{name}".endswith(f".{_CODEBOOK}")]
    if len(found) != 1:
        raise UserError(
            f"The checkpoint holds {len(found)} tensors named {_CODEBOOK}, but an image tokenizer has one."
        )
    return found[0]


def _read_tokens(source: Source, config: Mapping[str, Any]) -> tuple[int, ...]:
    if source.parse_vocabulary_map is None or not config.get("vocabulary_map"):
        return ()
    vocabulary_map = vqgan_format.read_vocabulary_map(config)
    try:
        return source.parse_vocabulary_map(vocabulary_map)
    except ValueError as error:
        raise UserError(f"config.json: vocabulary_map: {error}.") from None


def _refuse_to_write(config: Any) -> dict[str, Any]:
    raise UserError("An image tokenizer cannot be exported.")


def _read_janus(
    checkpoint: CheckpointFolder, values: Mapping[str, Any], prefix: str
) -> vqgan.VQGANConfig:
    del prefix
    v = ConfigReader(values, "config.json: vq_config")
    defaults = vqgan.VQGANConfig.janus()
    side = v.get("num_patches", int, 32)
    multipliers = vqgan_format.read_integers(v, "channel_multiplier", defaults.width_multipliers)
    return vqgan_format.read_config(
        v,
        defaults,
        image_size=side * 2 ** (len(multipliers) - 1),
        attention_sizes=(side,),
        gain=read_gain(checkpoint),
        has_decoder=True,
        unit_codes=True,
    )


def _read_emu3(
    checkpoint: CheckpointFolder, values: Mapping[str, Any], prefix: str
) -> emu3_vq.Emu3VQConfig:
    del prefix
    return emu3_format.read_config(checkpoint, values, read_gain(checkpoint))


def read_gain(checkpoint: CheckpointFolder) -> float:
    """The gain of a network whose input is gain * x - 1 for pixels x in 0..1.

    The folder must tell it, because what transformers assumes otherwise, CLIP's mean and standard deviation,
    is not what image tokenizers were trained with.

    Raises:
        UserError: the folder has no settings, or they ask for another scaling.
    """
    file = checkpoint.preprocessor_file
    r = ConfigReader(checkpoint.preprocessor, file)
    if not all(checkpoint.preprocessor.get(key) for key in ("image_mean", "image_std")):
        raise UserError(
            f"{file} has no image_mean and image_std, so it is unknown how pixels are scaled; copy the file "
            "of the published checkpoint into the folder."
        )
    r.require("do_rescale", True, True)
    r.require("do_normalize", True, True)
    factor = r.get("rescale_factor", float, 1 / 255)
    mean, std = (r.get(key, list) for key in ("image_mean", "image_std"))
    values = [*mean, *std]
    is_one_number = all(type(value) in (int, float) and value == values[0] for value in values)
    if len(mean) != 3 or len(std) != 3 or not is_one_number:
        raise UserError(
            f"{file}: image_mean is {mean} and image_std {std}; this converter supports three equal numbers, "
            "the same in both, which scale pixels from -1 on."
        )
    if not (image_processor.is_scale(factor) and image_processor.is_scale(values[0])):
        raise UserError(f"{file}: rescale_factor and image_std must be positive.")
    return 255 * factor / values[0]


SOURCES = {
    "chameleon": Source(
        "vqgan",
        vqgan.VQGANConfig,
        vqgan.VQGAN,
        chameleon_format.read_vq,
        lambda config, prefix: vqgan_format.rules(config, "", prefix),
        chameleon.parse_vocabulary_map,
    ),
    "janus": Source(
        "vqgan",
        vqgan.VQGANConfig,
        vqgan.VQGAN,
        _read_janus,
        lambda config, prefix: vqgan_format.rules(config, "", prefix, is_coarse_first=True),
        None,
    ),
    "emu3": Source(
        "emu3_vq",
        emu3_vq.Emu3VQConfig,
        emu3_vq.Emu3VQ,
        _read_emu3,
        emu3_format.rules,
        emu3_format.parse_vocabulary_map,
    ),
}
