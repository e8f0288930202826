"""Imported image tokenizers: transformers' codes and pixels, and their place among trained ones."""

import json
import pathlib
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tokenizers
from etils import epath

import rag_mm
from rag_mm.api import imported, importing
from rag_mm.cli import main
from rag_mm.convert import shards
from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.stages import chain_config
from rag_mm.stages.shared import coded_corpus, train_tokenizer, world_config

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import test_image_tokenizers
import tiny
import tiny_tokenizers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders of all tiny image tokenizers, by name; copy one before you change it."""
    place = tmp_path_factory.mktemp("folders")
    names = tiny_tokenizers.TOKENIZERS
    alone = {name: tiny_tokenizers.write(place / name, name) for name in names}
    return alone | {
        name: tiny_tokenizers.write_whole(place / name, name, alone[tokenizer])
        for name, (tokenizer, _, _) in tiny_tokenizers.WHOLE.items()
    }


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """The runs that they are imported to, by name."""
    place = tmp_path_factory.mktemp("runs")
    for name, folder in folders.items():
        importing.import_checkpoint("image-tokenizer", folder, place / name)
    return {name: place / name for name in folders}


@pytest.mark.parametrize("name", test_image_tokenizers.ALONE)
def test_codes_and_pixels_are_those_of_transformers(runs, name):
    """Of an image that is not square, and whose sides are not multiples of a code's."""
    tokenizer = rag_mm.load(str(runs[name]))
    pixels = tiny_tokenizers.images(*tiny_tokenizers.SIZES[1])
    golden = np.load(test_image_tokenizers.GOLDEN / f"{name}.npz", allow_pickle=False)
    codes = golden["codes_1"]
    assert len(np.unique(codes)) > 5
    found = tokenizer.encode(pixels)
    test_image_tokenizers.check_codes(tokenizer, found, codes, golden["latents_1"])
    if name != "chameleon_vq":
        drawn = tokenizer.model.compile("decode_grid")(codes)
        np.testing.assert_allclose(drawn, golden["pixels_1"], atol=1e-4)
        decoded = tokenizer.decode(
            codes.reshape(2, -1), grids=tokenizer.grids_at(*pixels.shape[1:3])
        )
        np.testing.assert_array_equal(decoded, np.round(np.asarray(drawn) * 255))


def test_the_contract_of_an_image_tokenizer(runs):
    tokenizer = rag_mm.load(str(runs["janus_vq"]))
    assert (tokenizer.image_size, tokenizer.num_codes, tokenizer.codebook_size) == (16, 16, 24)
    assert tokenizer.grids == ((4, 4),)
    np.testing.assert_array_equal(tokenizer.token_ids, np.arange(24, dtype=np.int32))
    codes = tokenizer.encode(tiny_tokenizers.images(16, 16))
    np.testing.assert_array_equal(tokenizer.decode(codes), tokenizer.decode(codes, num_levels=1))
    with pytest.raises(UserError, match="at least 4 x 4"):
        tokenizer.encode(np.zeros((1, 3, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"12 codes are not those of the first few of .*\(4, 4\)"):
        tokenizer.decode(codes[:, :12])
    with pytest.raises(UserError, match="without a text vocabulary"):
        _ = tokenizer.vocabulary
    with pytest.raises(UserError, match="imported without a decoder"):
        rag_mm.load(str(runs["chameleon_vq"])).decode(codes)


def test_a_whole_models_tokenizer_is_the_one_saved_alone(runs):
    """The rest of the model is left out, and its token ids are kept."""
    for whole, (alone, _, _) in tiny_tokenizers.WHOLE.items():
        first, second = (
            (runs[name] / "tokenizer" / "frozen" / "params.safetensors").read_bytes()
            for name in (alone, whole)
        )
        assert first == second
    ids = rag_mm.load(str(runs["emu3"])).token_ids
    assert ids.dtype == np.int32 and ids.tolist() == [99 - 2 * code for code in range(24)]


def test_every_bit_of_a_tensor_is_kept(runs, folders):
    config, processor = tiny_tokenizers.TOKENIZERS["emu3_vq"]
    family, folder = tiny_tokenizers.describe(config, processor)
    stored = runs["emu3_vq"] / "tokenizer" / "frozen" / "params.safetensors"
    specs = shards.read_header(epath.Path(stored))
    given = safetensors.numpy.load_file(folders["emu3_vq"] / shards.FILE)
    mappings = family.mappings(family.read_config(folder))
    assert {mapping.ours for mapping in mappings} == set(specs)
    assert {mapping.theirs for mapping in mappings} == set(given)
    for mapping in mappings:
        back = mapping.transform.save(shards.read_tensor(specs[mapping.ours]))
        np.testing.assert_array_equal(back, given[mapping.theirs], err_msg=mapping.theirs)


@pytest.mark.parametrize(
    ("name", "change", "processor", "reason"),
    [
        ("janus_vq", dict(model_type="llama"), None, "model_type is 'llama'; the image tokenizers"),
        ("janus_vq", dict(double_latent=True), None, "double_latent is True"),
        ("janus_vq", dict(base_channels=33), None, "multiples of 32"),
        ("janus_vq", dict(embed_dim=7), None, "has shape"),
        ("janus_vq", dict(channel_multiplier=["a"]), None, "not all integers"),
        ("janus_vq", {}, {}, "has no image_mean and image_std"),
        ("janus_vq", {}, dict(image_mean=[0.4, 0.5, 0.5]), "three equal numbers"),
        ("janus_vq", {}, dict(image_std=[0.5, 0.5]), "three equal numbers"),
        ("janus_vq", {}, dict(do_normalize=False), "do_normalize is False"),
        ("emu3_vq", {}, dict(spatial_factor=8), "spatial_factor is 8"),
        ("emu3_vq", {}, dict(min_pixels=3), "less than one code"),
        ("emu3_vq", dict(temporal_downsample_factor=3), None, "not a power of two"),
        ("emu3_vq", dict(num_attention_heads=2), None, "num_attention_heads is 2"),
        ("emu3", dict(vocabulary_map={"<|visual token 000001|>": 3}), None, "consecutively"),
        ("emu3", dict(vocabulary_map={"<|visual token 000000|>": 3}), None, "1 image tokens"),
    ],
)
def test_what_is_not_supported_gives_one_sentence(
    tmp_path, folders, name, change, processor, reason
):
    folder = shutil.copytree(folders[name], tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    if processor is not None:
        path = folder / "preprocessor_config.json"
        before = json.loads(path.read_text()) if processor else {}
        path.write_text(json.dumps(before | processor))
    with pytest.raises(UserError, match=reason) as raised:
        importing.import_checkpoint("image-tokenizer", folder, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_memory_stores_its_codes(tmp_path, runs, capsys):
    """`--tokenizer` brings them to a memory of any retriever; documents added later get them too."""
    clip = tiny.write(tmp_path / "clip", "clip")
    text = tokenizers.models.WordLevel({"<unk>": 0, "noise": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(text).save(str(clip / "tokenizer.json"))
    importing.import_checkpoint("clip", clip, tmp_path / "retriever")
    pictures = tiny_tokenizers.images(16, 16)
    for folder, picture in zip("ab", pictures, strict=True):
        (tmp_path / folder).mkdir()
        PIL.Image.fromarray(picture).save(tmp_path / folder / f"{folder}.png")
        line = json.dumps({"image": f"{folder}.png", "caption": "noise"})
        (tmp_path / folder / "captions.jsonl").write_text(line)
    memory = tmp_path / "memory"
    words = ["memory", "build", f"--documents={tmp_path / 'a'}", f"--out={memory}", "--index=exact"]
    words += [f"--retriever={tmp_path / 'retriever'}", f"--tokenizer={runs['janus_vq']}"]
    assert main.main(words) == 0
    add = ["memory", "add", str(memory), f"--documents={tmp_path / 'b'}"]
    assert main.main(add) == 0, capsys.readouterr().err
    expected = rag_mm.load(str(runs["janus_vq"])).encode(pictures)
    np.testing.assert_array_equal(retrieval_memory.Memory.open(memory).codes, expected)
    words[-1] = f"--tokenizer={tmp_path / 'retriever'}"
    words[3] = f"--out={tmp_path / 'other'}"
    assert main.main(words) == 2
    assert "is not a run with an image tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_a_chain_takes_it_in_place_of_training_one(tmp_path, runs):
    overrides = {"tokenizer.folder": str(runs["janus_vq"]), "tokenizer.num_eval": 8}
    values = chain_config.load("configs/quickstart.py:tiny", overrides)
    config = chain_config.stage_configs(values)["tokenizer"]
    run = run_folder.Run(epath.Path(tmp_path / "run"))
    run.workdir.mkdir()
    run.save_config({})
    stage = lambda run, folder: train_tokenizer.run(config, run, folder)
    run_folder.run_stage(run, "tokenizer", {}, (), stage)
    tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    assert tokenizer.image_size == 32 and tokenizer.grids == ((8, 8),)
    first = tokenizer.vocabulary.code_offset
    assert tokenizer.token_ids.tolist() == list(range(first, first + 24))
    source = config.world.scenes("test", *world_config.TUNE)
    layout = chain_config.stage_configs(values)["decoder"].layout(tokenizer.num_codes)
    mains, art = coded_corpus.Corpus(layout, tokenizer).test(source, np.arange(2))
    assert art.shape == (2, 64) and mains[0].codes.shape == (64,)
    pixels = world_config.images(source, np.arange(2))
    by_import = imported.load(runs["janus_vq"]).encode(pixels)
    np.testing.assert_array_equal([main.codes for main in mains], by_import)


def test_a_chain_refuses_a_tokenizer_without_a_decoder(runs):
    overrides = {"tokenizer.folder": str(runs["chameleon_vq"])}
    values = chain_config.load("configs/quickstart.py:tiny", overrides)
    with pytest.raises(UserError, match="is an image tokenizer without a decoder"):
        chain_config.stage_configs(values)


def test_chameleon_draws_pixels_with_janus_picture_decoder(tmp_path, runs):
    chameleon, pictures, _ = test_image_tokenizers.chameleon_and_pictures(tmp_path)
    with pytest.raises(UserError, match="add one by `with_pictures`"):
        chameleon.decode_image(np.zeros((1, 64), np.int32))
    codes = np.random.default_rng(0).integers(0, 16, (1, 64)).astype(np.int32)
    tokens = np.asarray(chameleon.model.code_tokens, np.int32)[codes]
    drawn = chameleon.with_pictures(pictures).decode_image(tokens)
    assert drawn.shape == (1, 16, 16, 3) and drawn.dtype == np.uint8 and drawn.std() > 30
    np.testing.assert_array_equal(drawn, pictures.decode(codes))
    with pytest.raises(UserError, match="The codebook_size of .* is 24, but this model's is 16"):
        chameleon.with_pictures(rag_mm.load(str(runs["janus_vq"])))
    with pytest.raises(UserError, match="is not an imported image tokenizer with a decoder"):
        chameleon.with_pictures(rag_mm.load(str(runs["chameleon_vq"])))


def test_a_copy_is_the_same_tokenizer(runs, tmp_path):
    copy = shutil.copytree(runs["janus_vq"] / "tokenizer" / "frozen", tmp_path / "copy")
    copied = train_tokenizer.load_tokenizer(copy)
    assert copied.fingerprint == rag_mm.load(str(runs["janus_vq"])).fingerprint
