"""The image preprocessing that a checkpoint folder declares, in the terms of transformers' image processors.

What CLIP and Chameleon compute here is one procedure: the shorter edge is scaled to the model's size, the
center is cropped, and pixels are multiplied and normalized. Settings that ask for another one are refused.
"""

import dataclasses
from typing import Any

from rag_mm.convert.table import CheckpointFolder, ConfigReader
from rag_mm.core.errors import UserError

_LARGEST = 1e6
Channels = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How pixels in 0..255 become a model's input: (pixel * factor - mean) / std.

    Attributes:
        name: the class in transformers.
        resample: number of the filter in Pillow.
        factor: multiplies pixels.
        mean: subtracted afterwards, by channel.
        std: divides the difference, by channel.
    """

    name: str
    resample: int
    factor: float
    mean: Channels
    std: Channels

    @property
    def of_unit_range(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation that have the same effect on pixels in 0..1."""
        gain = 255 * self.factor
        mean, std = ([value / gain for value in values] for values in (self.mean, self.std))
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def read(checkpoint: CheckpointFolder, defaults: ImageProcessor, size: int) -> ImageProcessor:
    """The image processor of a checkpoint.

    Args:
        checkpoint: without settings, `defaults` are used.
        defaults: the values of settings that are absent.
        size: side of the model's images in pixels.

    Raises:
        UserError: a setting asks for something that is not computed here.
    """
    r = ConfigReader(checkpoint.preprocessor, checkpoint.preprocessor_file)
    edge = {"shortest_edge": size}
    r.require("do_center_crop", True, True)
    r.require("resample", defaults.resample, defaults.resample)
    r.require("size", edge, edge, size)
    r.require("crop_size", size, {"height": size, "width": size}, size)
    return read_scaling(checkpoint, defaults)


def read_scaling(checkpoint: CheckpointFolder, defaults: ImageProcessor) -> ImageProcessor:
    """As `read`, of an image processor whose sizes and filter the caller reads."""
    r = ConfigReader(checkpoint.preprocessor, checkpoint.preprocessor_file)
    name = defaults.name
    r.require("image_processor_type", name, name, f"{name}Fast")
    r.require("do_resize", True, True)
    r.require("do_pad", False, False)
    factor, mean, std = 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if r.get("do_rescale", bool, True):
        factor = r.get("rescale_factor", float, defaults.factor)
    if r.get("do_normalize", bool, True):
        mean, std = (
            _channels(r, checkpoint.preprocessor_file, key, value)
            for key, value in (("image_mean", defaults.mean), ("image_std", defaults.std))
        )
    if not (is_scale(factor) and all(is_scale(value) for value in std)):
        raise UserError(
            f"{checkpoint.preprocessor_file}: rescale_factor is {factor} and image_std {list(std)}; both "
            "must be positive."
        )
    return ImageProcessor(defaults.name, defaults.resample, factor, mean, std)


def is_scale(value: float) -> bool:
    """Whether a number can multiply or divide pixels: positive, and neither tiny nor huge in float32."""
    return 1 / _LARGEST <= value <= _LARGEST


def _channels(r: ConfigReader, file: str, key: str, default: Channels) -> Channels:
    values: list[Any] = r.get(key, list, list(default))
    if len(values) != 3 or any(
        type(v) not in (int, float) or not abs(v) <= _LARGEST for v in values
    ):
        raise UserError(f"{file}: {key} is {values}; it must be three finite numbers.")
    return float(values[0]), float(values[1]), float(values[2])
