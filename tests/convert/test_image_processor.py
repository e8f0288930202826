"""The image processor of a checkpoint: what it changes is computed, what is not computed is refused."""

import numpy as np
import pytest
import tiny

from rag_mm.api import importing
from rag_mm.convert import table
from rag_mm.core.errors import UserError

CLIP = tiny.CHECKPOINTS["clip"][1]
CHAMELEON = tiny.CHECKPOINTS["chameleon"][1]
SIZE = CLIP["vision_config"]["image_size"]


def read(family="clip", **settings):
    values = {"clip": CLIP, "chameleon": CHAMELEON}[family]
    folder = table.CheckpointFolder(values, settings, "processor_config.json")
    return importing.FAMILIES[family].read_config(folder)


ONES = [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "factor", "mean", "std"),
    [
        (dict(image_mean=[0.2, 0.3, 0.4], image_std=ONES), 1 / 255, [0.2, 0.3, 0.4], ONES),
        (dict(image_mean=ONES, image_std=[0.5, 0.6, 0.4]), 1 / 255, ONES, [0.5, 0.6, 0.4]),
        (dict(do_normalize=False), 1 / 255, [0.0] * 3, ONES),
        (
            dict(do_rescale=False, image_mean=[120, 110, 100], image_std=ONES),
            1,
            [120, 110, 100],
            ONES,
        ),
        (dict(rescale_factor=1 / 127.5, image_mean=ONES, image_std=ONES), 1 / 127.5, ONES, ONES),
    ],
)
def test_pixels_are_normalized_as_declared(settings, factor, mean, std):
    config = read(**settings)
    pixels = np.array([0.0, 7.0, 255.0])  # One for each channel.
    expected = (pixels * factor - mean) / std
    found = (pixels / 255 - np.array(config.image_mean)) / np.array(config.image_std)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "usual",
    [
        {},
        dict(size=SIZE, crop_size=SIZE, resample=3, feature_extractor_type="CLIPFeatureExtractor"),
        dict(
            image_processor_type="CLIPImageProcessorFast",
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            do_resize=True,
            do_center_crop=True,
            do_pad=None,
            data_format="channels_first",
        ),
    ],
)
def test_the_usual_settings_in_every_spelling_are_the_default(usual):
    assert read(**usual) == read()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(do_resize=False), "do_resize is False"),
        (dict(do_center_crop=False), "do_center_crop is False"),
        (dict(do_pad=True), "do_pad is True"),
        (dict(resample=2), "resample is 2; this converter supports 3"),
        (dict(size={"shortest_edge": SIZE + 4}), "size is .*16"),
        (dict(size={"height": SIZE, "width": SIZE}), "size is .*height"),
        (dict(crop_size=SIZE + 4), "crop_size is 16"),
        (dict(image_processor_type="ViTImageProcessor"), "image_processor_type is 'ViTImage"),
        (dict(image_mean=["a", "b", "c"]), "image_mean is .* three finite numbers"),
        (dict(image_mean=[float("nan")] * 3), "image_mean is .* three finite numbers"),
        (dict(image_std=[0.0, 1, 1]), "image_std .* must be positive"),
        (dict(rescale_factor=0), "rescale_factor is 0.0"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(settings, reason):
    with pytest.raises(UserError, match=f"^processor_config.json: .*{reason}"):
        read(**settings)


def test_chameleon_has_one_normalization():
    assert read("chameleon", rescale_factor=0.01).vq.gain == pytest.approx(2.55)
    assert read("chameleon", resample=1, image_mean=[1, 1, 1]).vq.gain == pytest.approx(1.989)
    for settings in (dict(do_normalize=False), dict(image_std=[0.5, 0.5, 0.5]), dict(resample=3)):
        with pytest.raises(UserError, match="this converter supports 1"):
            read("chameleon", **settings)
