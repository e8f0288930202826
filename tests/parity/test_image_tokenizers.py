"""Imported image tokenizers against transformers: codes and pixels from random weights.

    python tests/parity/test_image_tokenizers.py

writes the golden files, with which tests/api/test_imported_tokenizers.py compares without torch; it needs
the extra [parity].
"""

import pathlib
import sys
import tempfile

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny
import tiny_tokenizers
from peer import GOLDEN

from rag_mm.api import imported, importing

pytestmark = pytest.mark.parity
ALONE = ("janus_vq", "emu3_vq", "chameleon_vq")


def model_class(name):
    """The class in transformers."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    classes = {"janus_vq": JanusVQVAE, "emu3_vq": Emu3VQVAE, "chameleon_vq": ChameleonVQVAE}
    return classes[name]


def load(name, folder):
    """transformers' model of a folder; missing or unexpected tensors are an error."""
    model, report = model_class(name).from_pretrained(folder, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")]
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval()


def encode(name, model, pixels):
    """Codes [B, R, C], and the latents that they are nearest to, [B, R, C, D]."""
    import torch

    scaled = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    scaled = torch.tensor(scaled * 0.0078 - 1 if name == "chameleon_vq" else scaled / 127.5 - 1)
    with torch.no_grad():
        if name == "emu3_vq":
            size = torch.tensor([pixels.shape[1:3]] * len(pixels))
            found = model.encode(scaled, size)
            latents = model.quant_conv(found.last_hidden_state.permute(0, 2, 1, 3, 4))[:, :, 0]
            codes = torch.stack(found.image_tokens)
        else:
            found = model.encode(scaled)
            latents = model.quant_conv(found.last_hidden_state)
            codes = found.image_tokens.reshape(len(pixels), *latents.shape[2:])
    return codes.numpy().astype(np.int32), latents.permute(0, 2, 3, 1).numpy()


def decode(name, model, codes):
    """Pixels in 0..1, float32 [B, H, W, 3], of codes [B, R, C]."""
    import torch

    given = torch.tensor(codes).long()
    with torch.no_grad():
        if name == "emu3_vq":
            pixels = model.decode(given)
        else:
            model.quantize.quant_state_dims = list(codes.shape[1:])
            pixels = model.decode(given.flatten(1))
    return np.clip((pixels.permute(0, 2, 3, 1).numpy() + 1) / 2, 0, 1)


def check_codes(tokenizer, found, expected, latents):
    """Whether codes [B, N] are the expected ones [B, R, C]; both of two equally near codes will do."""
    flat, codes = latents.reshape(-1, latents.shape[-1]), expected.ravel()
    codebook = np.asarray(tokenizer.model.params["codebook"]["embedding"])
    distances = np.square(flat[:, None] - codebook).sum(-1)
    rows = np.arange(len(flat))
    gap = distances[rows, found.ravel()] - distances[rows, codes]
    assert found.shape == (len(expected), codes.size // len(expected))
    assert (np.abs(gap) < 1e-4).all() and (found.ravel() != codes).mean() < 0.02


def compute(name, folder):
    """All that is compared, for both sizes."""
    model, found = load(name, folder), {}
    for number, size in enumerate(tiny_tokenizers.SIZES):
        codes, latents = encode(name, model, tiny_tokenizers.images(*size))
        found |= {f"codes_{number}": codes, f"latents_{number}": latents}
        if name != "chameleon_vq":
            found[f"pixels_{number}"] = decode(name, model, codes)
    return found


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


@pytest.mark.parametrize("name", ALONE)
def test_golden_files_match_the_installed_transformers(torch, tmp_path, name):
    found = compute(name, tiny_tokenizers.write(tmp_path / "a", name))
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        assert set(golden) == set(found)
        for key, value in golden.items():
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("size", tiny_tokenizers.SIZES)
def test_codes_latents_and_pixels(torch, tmp_path, name, size):
    folder = tiny_tokenizers.write(tmp_path / "a", name)
    importing.import_checkpoint("image-tokenizer", folder, tmp_path / "run")
    ours, theirs = imported.load(tmp_path / "run"), load(name, folder)
    pixels = tiny_tokenizers.images(*size)
    codes, latents = encode(name, theirs, pixels)
    check_codes(ours, ours.encode(pixels), codes, latents)
    found = ours.model.compile("embed")(pixels.astype(np.float32) / 255)
    np.testing.assert_allclose(found, latents, atol=1e-4)
    if name != "chameleon_vq":
        drawn = ours.model.compile("decode_grid")(codes)
        np.testing.assert_allclose(drawn, decode(name, theirs, codes), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "grid"), [("janus_vq", 32), ("emu3_vq", 64), ("chameleon_vq", 32)]
)
def test_names_and_shapes_at_the_default_sizes(torch, name, grid):
    """Those of the published models, but for Janus-Pro's 24 codes a side."""
    config = model_class(name).config_class()
    with torch.device("meta"):
        state = model_class(name)(config).state_dict()
    processor = {} if name == "chameleon_vq" else tiny_tokenizers.HALF
    family, folder = tiny_tokenizers.describe(config.to_dict(), processor)
    ours = family.read_config(folder)
    assert ours.grids_at(ours.image_size, ours.image_size) == ((grid, grid),)
    shapes = {key: tuple(v.shape) for key, v in state.items() if v.is_floating_point()}
    assert {m.theirs: m.shape for m in family.mappings(ours)} == shapes


def test_what_transformers_saves_is_imported(torch, tmp_path):
    """Its own names, counters of BatchNorm included, and its own config.json."""
    folder = tiny_tokenizers.write(tmp_path / "a", "emu3_vq")
    model = load("emu3_vq", folder)
    model.save_pretrained(tmp_path / "b")
    (folder / "preprocessor_config.json").rename(tmp_path / "b" / "preprocessor_config.json")
    assert "encoder.time_res_stack.0.norm1.num_batches_tracked" in model.state_dict()
    importing.import_checkpoint("image-tokenizer", tmp_path / "b", tmp_path / "run")
    pixels = tiny_tokenizers.images(16, 16)
    codes, _ = encode("emu3_vq", model, pixels)
    np.testing.assert_array_equal(
        imported.load(tmp_path / "run").encode(pixels), codes.reshape(2, -1)
    )


def test_chameleon_with_janus_decoder_draws_the_pixels_of_transformers(torch, tmp_path):
    chameleon, pictures, folder = chameleon_and_pictures(tmp_path)
    tokens = chameleon.generate_image([42, 40], seed=1)
    found = chameleon.with_pictures(pictures).decode_image(tokens[None])
    codes = [chameleon.model.code_tokens.index(token) for token in tokens]
    expected = decode("janus_vq", load("janus_vq", folder), np.reshape(codes, (1, 8, 8)))
    np.testing.assert_allclose(found, 255 * expected, atol=0.5 + 255e-4)
    assert found.std() > 30


def chameleon_and_pictures(place):
    """A Chameleon without a decoder, a Janus tokenizer with one and the same codebook, and its folder."""
    from etils import epath

    from rag_mm.convert import shards

    config = tiny.CHECKPOINTS["chameleon"][1] | dict(max_position_embeddings=96)
    theirs = tiny.write(place / "chameleon", "chameleon", config=config)
    codebook = shards.open_folder(epath.Path(theirs))["model.vqmodel.quantize.embedding.weight"]
    folder = tiny_tokenizers.write(
        place / "janus",
        "janus_vq",
        {tiny_tokenizers.CODEBOOK: shards.read_tensor(codebook)},
        num_embeddings=16,
        channel_multiplier=[1, 2],
        num_patches=8,
    )
    importing.import_checkpoint("chameleon", theirs, place / "run")
    importing.import_checkpoint("image-tokenizer", folder, place / "pictures")
    return imported.load(place / "run"), imported.load(place / "pictures"), folder


if __name__ == "__main__":
    for each in ALONE:
        with tempfile.TemporaryDirectory() as temporary:
            made = compute(each, tiny_tokenizers.write(pathlib.Path(temporary) / "a", each))
        np.savez_compressed(GOLDEN / f"{each}.npz", **made)
        print(each, {key: value.shape for key, value in made.items()})
        print([len(np.unique(made[f"codes_{number}"])) for number in (0, 1)])
