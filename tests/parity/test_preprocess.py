"""Images of every kind are preprocessed as by transformers' processors."""

import io
import pathlib

import numpy as np
import PIL.Image
import pytest

from rag_mm.data import preprocess, sources

SIZES = [(41, 67), (67, 41), (32, 32), (33, 32), (31, 500), (20, 90), (7, 5)]
SIZE = 32


def make_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """Smooth waves with noise, so that mistakes in scaling or cropping are visible."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "P": 3, "1": 1}[mode]
    rng = np.random.default_rng(seed)
    waves = [np.sin(x / (3 + c)) + np.cos(y / (4 + c)) for c in range(channels)]
    pixels = np.stack(waves, -1) * 50 + 128 + rng.normal(0, 12, (height, width, channels))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    if mode in ("P", "1"):
        return PIL.Image.fromarray(np.squeeze(pixels)).convert(mode)
    return PIL.Image.fromarray(np.squeeze(pixels), mode)


def files() -> dict[str, bytes]:
    """File contents by kind."""
    found = {}

    def save(name, image, form, **kwargs):
        buffer = io.BytesIO()
        image.save(buffer, form, **kwargs)
        found[name] = buffer.getvalue()

    for width, height in SIZES:
        save(f"{width}x{height}", make_image(width, height), "PNG")
    for mode in ("L", "LA", "RGBA", "P", "1"):
        save(mode, make_image(61, 45, mode), "PNG")
    save("CMYK", make_image(61, 45, "CMYK"), "JPEG", quality=95)
    for orientation in (3, 6, 8, 5):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        save(f"exif {orientation}", make_image(61, 45), "JPEG", exif=exif, quality=95)
    return found


FILES = files()


def fit(data: bytes, resample: str, place: pathlib.Path) -> np.ndarray:
    path = place / "picture"
    path.write_bytes(data)
    # transformers drops the alpha channel, which exposes the color of transparent pixels.
    return preprocess.scale_and_crop(
        sources.load_image(path, composite_on_white=False), SIZE, resample
    )


@pytest.mark.parity
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("family", ["clip", "chameleon"])
def test_matches_the_processors(tmp_path, family, kind):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import image_utils
    from transformers.models.chameleon.image_processing_pil_chameleon import (
        ChameleonImageProcessorPil,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    make = {"clip": CLIPImageProcessorPil, "chameleon": ChameleonImageProcessorPil}[family]
    processor = make(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    (tmp_path / "theirs").write_bytes(FILES[kind])
    theirs = image_utils.load_image(str(tmp_path / "theirs"))
    expected = processor(theirs, do_normalize=False, rescale_factor=1 / 255).pixel_values[0]
    resample = {"clip": "bicubic", "chameleon": "lanczos"}[family]
    found = fit(FILES[kind], resample, tmp_path).transpose(2, 0, 1) / 255
    assert np.abs(found - np.asarray(expected)).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize("is_tall", [True, False])
def test_of_a_very_long_image_only_the_part_shown_is_scaled(monkeypatch, is_tall, resample):
    """Waves: of noise more differs, as Pillow clips between its passes, which it orders by the sizes."""
    line = 128 + 90 * np.sin(np.arange(40_001)[:, None] / [20, 30, 40])
    long = np.stack([line, line[::-1], line + 20], axis=1)
    pixels = np.clip(long if is_tall else long.transpose(1, 0, 2), 0, 255).astype(np.uint8)
    found = preprocess.scale_and_crop(pixels, SIZE, resample).astype(int)
    monkeypatch.setattr(preprocess, "_MAX_SCALED", 1 << 40)
    whole = preprocess.scale_and_crop(pixels, SIZE, resample).astype(int)
    assert found.std() > 10 and np.abs(found - whole).max() <= 1


def test_memory_does_not_grow_with_an_images_length():
    """Whole, the scaled image would take 33 GB."""
    pixels = np.full((1, 65_000, 3), 77, np.uint8)
    np.testing.assert_array_equal(preprocess.scale_and_crop(pixels, 224, "bicubic"), 77)


@pytest.mark.parametrize("kind", [f"{w}x{h}" for w, h in SIZES])
def test_scaling_equals_pillows_scaling_of_the_whole_image(tmp_path, kind):
    image = PIL.Image.open(io.BytesIO(FILES[kind]))
    width, height = image.size
    short = min(width, height)
    new = (int(SIZE * width / short), int(SIZE * height / short))
    left, top = (new[0] - SIZE) // 2, (new[1] - SIZE) // 2
    scaled = image.resize(new, PIL.Image.Resampling.BICUBIC)
    expected = np.asarray(scaled.crop((left, top, left + SIZE, top + SIZE)))
    np.testing.assert_array_equal(fit(FILES[kind], "bicubic", tmp_path), expected)
