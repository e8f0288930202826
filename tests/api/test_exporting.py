"""Exporting trained runs: decoders under their own names or as LLaMA, retrievers as CLIP."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from rag_mm.api import exporting, imported, importing
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import vocabulary
from rag_mm.models import clip, cm3leon, ra_cm3
from rag_mm.models.spae import autoencoder, spae_config
from rag_mm.nn import decoder as decoder_lib
from rag_mm.nn import param_trees
from rag_mm.stages.shared import frozen, starting_point
from rag_mm.train import checkpoint

DECODER = decoder_lib.DecoderConfig(300, 2, 16, 2, 24, 32)
SMEARED = dataclasses.replace(DECODER, smear_lags=((1,),), qk_norm=True)
WORDS = vocabulary.train_vocabulary(["a red apple on blue"], 262, codebook_size=16, num_sentinels=2)
CLIP = clip.CLIPConfig(
    image_size=8,
    patch_size=4,
    vision=clip.TowerConfig(16, 2, 2, 32),
    text=clip.TowerConfig(8, 1, 2, 16),
    vocab_size=WORDS.code_offset,
    max_text_len=6,
    end_of_text=WORDS.eod,
    projection_dim=8,
)


def random_params(make_model, seed=0):
    """Structure and random parameters; NumPy draws them, so that nothing is compiled."""
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32))
    return graphdef, jax.tree.map(draw, abstract)


def make_decoder(config):
    return lambda: decoder_lib.Decoder(config, rngs=nnx.Rngs(0))


def make_run(folder, config):
    """A run with finished stages tokenizer, retriever, decoder and sft, whose parameters are random."""
    run = run_folder.Run(epath.Path(folder))

    def tokenizer(run, stage_dir):
        shape = spae_config.SPAEConfig.tiny()
        params = random_params(lambda: autoencoder.SPAE(shape, rngs=nnx.Rngs(0)))[1]
        frozen.save_tokenizer(stage_dir / "frozen", shape, WORDS, params)
        return {}

    def retriever(run, stage_dir):
        params = random_params(lambda: clip.CLIP(CLIP, rngs=nnx.Rngs(0)))[1]
        frozen.save_retriever(stage_dir / "frozen", CLIP, WORDS, params)
        return {}

    def decoder(run, stage_dir):
        seed = int(stage_dir.name == "sft")
        checkpoint.save_params(stage_dir / "params", random_params(make_decoder(config), seed)[1])
        model = {
            "decoder": dataclasses.asdict(config),
            "code_offset": WORDS.code_offset,
            "alpha": 0.1,
        }
        files.write_json(stage_dir / "decoder.json", {"model": model})
        return {}

    run.workdir.mkdir(parents=True)
    run.save_config({"seed": 0})
    for stage in (tokenizer, retriever, decoder):
        run_folder.run_stage(run, stage.__name__, {}, (), stage)
    run_folder.run_stage(run, "sft", {}, (), decoder)
    return folder


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (SMEARED, "stack.1.attention.k_smear"),
        (ra_cm3.RACM3Config.tiny().decoder, "stack.1.mlp.down.bias"),
        (cm3leon.CM3LeonConfig.tiny("blocks").decoder, "position_embedding.table"),
        (cm3leon.CM3LeonConfig.tiny("head").decoder, "head.table"),
    ],
    ids=["quickstart", "ra_cm3", "cm3leon_blocks", "cm3leon_head"],
)
def test_a_decoder_is_exported_under_its_own_names_with_a_name_table(tmp_path, config, named):
    run = make_run(tmp_path / "run", config)
    made = exporting.export_checkpoint("cm3", run, tmp_path / "out", 1 << 30)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    names = json.loads((tmp_path / "out" / "names.json").read_text())
    wanted = param_trees.leaves_by_path(random_params(make_decoder(config))[1])
    assert made["tensors"] == len(tensors)
    seen = set()
    for name, row in names.items():
        for layer in range(row["layers"] or 1):
            array = tensors[name.format(layer)]
            assert list(array.shape) == row["shape"] and len(row["axes"]) == array.ndim
            path = name.replace("stack.{}.", "stack.blocks.").replace(".", "/")
            ours = wanted[path] if row["layers"] is None else wanted[path][layer]
            np.testing.assert_array_equal(array, ours)
            seen.add(name.format(layer))
    assert seen == set(tensors) and named in seen
    assert names["stack.{}.attention.q.kernel"]["axes"] == ["embed", "heads", "head_dim"]
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values.pop("model_type") == "rag_mm_decoder" and values.pop("dtype") == "float32"
    read = {name: value for name, value in values.items() if name != "smear_lags"}
    assert read.items() <= dataclasses.asdict(config).items()
    assert values["scale_embeddings"] == config.scale_embeddings
    assert values["smear_lags"] == [list(lags) for lags in config.smear_lags]
    kept = vocabulary.load_vocabulary(epath.Path(tmp_path / "out" / "vocabulary.json"))
    assert kept.fingerprint == WORDS.fingerprint


def test_a_decoder_with_llamas_architecture_round_trips_as_llama(tmp_path):
    run = make_run(tmp_path / "run", DECODER)
    exporting.export_checkpoint("llama", run, tmp_path / "out", 10_000)
    importing.import_checkpoint("llama", tmp_path / "out", tmp_path / "again")
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    graphdef, params = random_params(make_decoder(DECODER))
    model = nnx.merge(graphdef, params)
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    wanted = model.logits(model(tokens, positions, np.ones_like(tokens)))
    again = imported.load(tmp_path / "again")
    np.testing.assert_allclose(again.logits(tokens), wanted, atol=1e-6)
    assert again.text.encode_text("a red apple") == WORDS.encode_text("a red apple")
    assert again.stop_tokens == (WORDS.eod,)


def test_the_decoder_of_another_stage_is_exported_where_it_is_named(tmp_path):
    run = make_run(tmp_path / "run", DECODER)
    exporting.export_checkpoint("cm3", run, tmp_path / "out", 1 << 30, stage="sft")
    tables = [
        param_trees.leaves_by_path(random_params(make_decoder(DECODER), seed)[1])["embedding/table"]
        for seed in (0, 1)
    ]
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(exported["embedding.table"], tables[1])
    assert not np.array_equal(*tables)
    for family, stage, says in (
        ("cm3", "control", "no stage 'control'"),
        ("cm3", "tokenizer", "has no decoder; give one that trains one"),
        ("cm3", "../sft", "is no name of a stage"),
        ("clip", "sft", "clip of .* is none; leave it out"),
    ):
        with pytest.raises(UserError, match=says):
            exporting.export_checkpoint(family, run, tmp_path / "no", 1 << 30, stage=stage)


def test_a_tuned_decoder_comes_back_with_equal_bits(tmp_path):
    run = make_run(tmp_path / "run", SMEARED)
    exporting.export_checkpoint("cm3", run, tmp_path / "out", 10_000, stage="sft")
    importing.import_checkpoint("cm3", tmp_path / "out", tmp_path / "again")
    folder = epath.Path(tmp_path / "again" / "language_model")
    abstract = param_trees.describe(make_decoder(SMEARED), None)[1]
    found = param_trees.leaves_by_path(starting_point.load(folder, abstract))
    wanted = param_trees.leaves_by_path(random_params(make_decoder(SMEARED), 1)[1])
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    exporting.export_checkpoint("cm3", tmp_path / "again", tmp_path / "out2", 10_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "out2").iterdir()}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    again = imported.load(tmp_path / "again")
    assert again.config.smear_lags == SMEARED.smear_lags
    assert again.text.encode_text("a red apple") == WORDS.encode_text("a red apple")


@pytest.mark.parametrize("lags", [3, [1], [["a"]]])
def test_a_changed_config_of_a_decoder_is_refused(tmp_path, lags):
    run = make_run(tmp_path / "run", SMEARED)
    exporting.export_checkpoint("cm3", run, tmp_path / "out", 1 << 30)
    path = tmp_path / "out" / "config.json"
    files.write_json(path, files.read_json(path) | {"smear_lags": lags})
    with pytest.raises(UserError, match="smear_lags"):
        importing.import_checkpoint("cm3", tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("family", ["llama", "chameleon"])
def test_a_decoder_of_another_architecture_is_refused(tmp_path, family):
    run = make_run(tmp_path / "run", dataclasses.replace(DECODER, smear_lags=((1,),)))
    reason = {"llama": "its smear_lags is", "chameleon": "more parts than a decoder"}
    with pytest.raises(UserError, match=reason[family]):
        exporting.export_checkpoint(family, run, tmp_path / "out", 1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_retriever_round_trips_as_clip(tmp_path):
    run = make_run(tmp_path / "run", DECODER)
    exporting.export_checkpoint("clip", run, tmp_path / "out", 1 << 30)
    importing.import_checkpoint("clip", tmp_path / "out", tmp_path / "again")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    before = frozen.FrozenRetriever(run / "retriever" / "frozen").encode_image(pictures)
    again = imported.load(tmp_path / "again")
    np.testing.assert_array_equal(again.encode_image(list(pictures)), before)
    with pytest.raises(UserError, match="has no tokenizer and cannot encode text"):
        again.encode_text(["a red apple"])
