"""Emu's U-Net and autoencoder are imported, draw, and come back bit for bit; wrong ones are refused."""

import json
import shutil

import numpy as np
import pytest
import tiny_emu_folder
from etils import epath

from rag_mm.api import emu_painter, exporting, imported, importing
from rag_mm.convert import shards, stable_diffusion_format
from rag_mm.core.errors import UserError
from rag_mm.models.emu.latent_vae import LatentVAEConfig
from rag_mm.models.emu.unet import UNetConfig

UNET = UNetConfig(8, 4, (8, 16), (True, False), 1, num_heads=2, num_groups=4)
VAE = LatentVAEConfig(16, (8, 16), 1, num_groups=4)


def write_parts(folder, condition_dim=16, vae=VAE):
    """`unet` and `vae` with random weights, the attention of `vae` under its older names."""
    configs = {
        "unet": stable_diffusion_format.ImportedUNetConfig(UNET, condition_dim),
        "vae": vae,
    }
    for name, config in configs.items():
        family, own = emu_painter.FAMILIES[name], folder / name
        own.mkdir(parents=True)
        shapes = {each.theirs: each.shape for each in family.mappings(config)}
        if name == "vae":
            new = {new: old for old, new in stable_diffusion_format.OLD_NAMES.items()}
            shapes = {
                next((k.replace(a, b) for a, b in new.items() if f".0.{a}" in k), k): v
                for k, v in shapes.items()
            }
        tensors = {k: tiny_emu_folder.draw(k, shape) for k, shape in shapes.items()}
        typed = {k: (np.dtype(np.float16), x.shape) for k, x in tensors.items()}
        load = lambda k, tensors=tensors: tensors[k].astype(np.float16)
        shards.write_folder(own, typed, load, 1 << 30)
        (own / shards.FILE).rename(own / stable_diffusion_format.WEIGHTS)
        (own / "config.json").write_text(json.dumps(family.write_config(config)))


@pytest.fixture(scope="module")
def emu_folder(tmp_path_factory):
    folder = tiny_emu_folder.write(tmp_path_factory.mktemp("emu") / "theirs")
    write_parts(folder)
    return folder


def test_an_emu_with_its_visual_decoder_draws_and_comes_back(emu_folder, tmp_path):
    importing.import_checkpoint("emu", emu_folder, tmp_path / "run")
    emu = imported.load(tmp_path / "run")
    prompts = [emu.prompt(["a red dog"]), emu.prompt(["two cat"])]
    images = emu.generate_image(prompts, num_steps=2)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, emu.generate_image(prompts, num_steps=2))
    assert (images != emu.generate_image(prompts, num_steps=2, seed=1)).any()
    null = emu.imagine([emu.prompt([])])[0]
    np.testing.assert_array_equal(emu.painter.params["null"], null)
    unguided = emu.generate_image([emu.prompt([])] * 2, num_steps=2, guidance=1.0)
    # Guidance away from the empty prompt does not change what is drawn of it.
    guided = emu.generate_image([emu.prompt([])] * 2, num_steps=2, guidance=4.0)
    assert np.abs(unguided.astype(int) - guided).max() <= 1
    with pytest.raises(UserError, match="num_steps is 0"):
        emu.generate_image(prompts, num_steps=0)
    exporting.export_checkpoint("emu", tmp_path / "run", tmp_path / "again", max_bytes=1 << 30)
    for name in ("unet", "vae"):
        before, after = (
            stable_diffusion_format.open_folder(epath.Path(each / name))
            for each in (emu_folder, tmp_path / "again")
        )
        family = emu_painter.FAMILIES[name]
        before = family.rename(VAE, before)
        assert set(before) == set(after)
        for key, spec in after.items():
            found, expected = (shards.read_tensor(each) for each in (spec, before[key]))
            np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
        texts = [
            (each / name / "config.json").read_text() for each in (emu_folder, tmp_path / "again")
        ]
        assert json.loads(texts[0]) == json.loads(texts[1])
    assert importing.open_checkpoint("emu", tmp_path / "again").config == emu_config(emu_folder)


def emu_config(folder):
    return importing.open_checkpoint("emu", folder).config


def test_an_emu_without_one_says_so(emu_folder, tmp_path):
    folder = tmp_path / "alone"
    shutil.copytree(emu_folder, folder, ignore=shutil.ignore_patterns("unet", "vae"))
    importing.import_checkpoint("emu", folder, tmp_path / "run")
    emu = imported.load(tmp_path / "run")
    with pytest.raises(UserError, match="imported without a visual decoder"):
        emu.generate_image([emu.prompt(["a dog"])])


def test_parts_that_do_not_fit_are_refused(emu_folder, tmp_path):
    config = emu_config(emu_folder)
    write_parts(tmp_path / "narrow", condition_dim=12)
    with pytest.raises(UserError, match="vectors of width 12, but Emu's codes have 16"):
        emu_painter.open_parts(tmp_path / "narrow", config)
    write_parts(tmp_path / "large", vae=LatentVAEConfig(32, (8, 16), 1, num_groups=4))
    with pytest.raises(
        UserError, match="unet and vae do not fit each other: the network denoises 8"
    ):
        emu_painter.open_parts(tmp_path / "large", config)
    shutil.rmtree(tmp_path / "narrow" / "vae")
    with pytest.raises(UserError, match="unet alone"):
        emu_painter.open_parts(tmp_path / "narrow", config)
    values = json.loads((emu_folder / "unet" / "config.json").read_text())
    for change in ({"act_fn": "gelu"}, {"down_block_types": ["AttnDownBlock2D"] * 2}):
        write_parts(tmp_path / next(iter(change)))
        file = tmp_path / next(iter(change)) / "unet" / "config.json"
        file.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=next(iter(change))):
            emu_painter.open_parts(file.parent.parent, config)
