"""Tiny image tokenizers in Hugging Face's format, from NumPy alone, like the checkpoints of `tiny`."""

import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy
import tiny

from rag_mm.convert import image_tokenizer_format, shards, table

CODEBOOK = "quantize.embedding.weight"
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=1 / 255)
_SIZES = dict(embed_dim=6, latent_channels=10, base_channels=32, num_res_blocks=1)
_EMU3 = dict(
    model_type="emu3_vqgan",
    codebook_size=24,
    embed_dim=4,
    latent_channels=4,
    base_channels=32,
    channel_multiplier=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[1],
    hidden_size=64,
    temporal_downsample_factor=4,
)
_JANUS = dict(
    _SIZES,
    model_type="janus_vqgan",
    num_embeddings=24,
    channel_multiplier=[1, 2, 1],
    num_patches=4,
)
_CHAMELEON = dict(
    _SIZES,
    model_type="chameleon_vqgan",
    num_embeddings=24,
    channel_multiplier=[1, 2],
    resolution=10,
    attn_resolutions=[10],
)
_EMU3_MEAN = (1.4, 2.2, 0.4, 0.3)  # of the latents of `images`
# name -> (config.json, preprocessor_config.json); each is an image tokenizer alone
TOKENIZERS = {
    "janus_vq": (_JANUS, HALF),
    "emu3_vq": (_EMU3, HALF | dict(size=dict(min_pixels=120), spatial_factor=2)),
    "chameleon_vq": (_CHAMELEON, {}),
}
# name of a whole model -> (its tokenizer, config.json, prefix of the tokenizer's tensors)
WHOLE = {
    "janus": ("janus_vq", dict(model_type="janus", vq_config=_JANUS), "model.vqmodel."),
    "emu3": (
        "emu3_vq",
        dict(
            model_type="emu3",
            vq_config=_EMU3,
            vocabulary_map={f"<|visual token {code:06}|>": 99 - 2 * code for code in range(24)}
            | {"<image>": 1},
        ),
        "vqmodel.",
    ),
}


def describe(config: dict, processor: dict) -> tuple[table.Family, table.CheckpointFolder]:
    """The family of a tokenizer, and the folder that its `read_config` takes."""
    folder = table.CheckpointFolder(config, processor, specs={CODEBOOK: None})
    return image_tokenizer_format.find(folder)[0], folder


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As `tiny.draw`; latents are spread over the codebook."""
    values = tiny.draw(name, shape)
    if name.endswith("running_var"):
        return np.abs(values) + np.float32(0.5)
    if name.endswith("quant_conv.conv.weight") and "post" not in name:
        return 12 * values
    if name.endswith(CODEBOOK) and shape[1] == len(_EMU3_MEAN):
        return 2 * values + np.array(_EMU3_MEAN, np.float32)
    return values


def write(
    place: pathlib.Path, name: str, tensors: dict[str, np.ndarray] | None = None, **change: object
) -> pathlib.Path:
    """Writes a checkpoint folder; `tensors` replace those of their names, `change` values of the config."""
    config, processor = TOKENIZERS[name]
    config = config | change
    family, folder = describe(config, processor)
    given = tensors or {}
    shapes = {
        m.theirs: (np.dtype(np.float32), m.shape)
        for m in family.mappings(family.read_config(folder))
    }
    place.mkdir(parents=True)
    read = lambda tensor: given[tensor] if tensor in given else draw(tensor, shapes[tensor][1])
    shards.write_folder(place, shapes, read, 1 << 30)
    (place / "config.json").write_text(json.dumps(config))
    if processor:
        (place / "preprocessor_config.json").write_text(json.dumps(processor))
    return place


def write_whole(place: pathlib.Path, name: str, alone: pathlib.Path) -> pathlib.Path:
    """A whole model's checkpoint folder, with the tokenizer of the folder `alone`."""
    _, config, prefix = WHOLE[name]
    shutil.copytree(alone, place)
    (place / "config.json").write_text(json.dumps(config))
    tensors = {prefix + k: v for k, v in safetensors.numpy.load_file(place / shards.FILE).items()}
    tensors["lm_head.weight"] = np.ones((4, 3), np.float32)
    safetensors.numpy.save_file(tensors, place / shards.FILE)
    return place


def images(height: int, width: int) -> np.ndarray:
    """uint8 [2, height, width, 3]: noise on a slope, so that codes vary from place to place."""
    rng = np.random.default_rng(height)
    slope = np.linspace(0, 160, height)[:, None, None] * np.ones((1, width, 3))
    return (slope + rng.integers(0, 96, (2, height, width, 3))).astype(np.uint8)


SIZES = ((16, 16), (19, 14))  # the second has odd halves and is not square
