"""The chain's picture: an order in which every stage finds its inputs, and configs that are right at once."""

import copy
import dataclasses
import types

import pytest

from configs import quickstart
from rag_mm.core.errors import UserError
from rag_mm.models import cm3leon
from rag_mm.nn import decoder
from rag_mm.stages import chain, chain_config
from rag_mm.stages.ra_cm3 import decoder_training


@pytest.fixture
def config():
    return chain_config.load("configs/quickstart.py:tiny")


def test_every_stage_reads_only_what_is_made_before_it():
    order = list(chain_config.STAGES)
    assert tuple(name for name in order if name in quickstart.STAGES) == quickstart.STAGES
    for place, name in enumerate(order):
        assert set(chain_config.STAGES[name].inputs) <= set(order[:place])


@pytest.mark.parametrize("preset", ["toy", "tiny"])
def test_the_fusion_reads_the_pairs_that_its_config_names(preset):
    configs = chain_config.stage_configs(chain_config.load(f"configs/reco.py:{preset}"))
    pairs = {"toy": "toy_pairs", "tiny": "pairs"}[preset]
    assert chain_config.STAGES["fusion"].inputs_for(configs["fusion"]) == (pairs,)
    page = chain_config.load(f"configs/reco.py:{preset}", {"fusion.pairs": "memory"})
    with pytest.raises(UserError, match="fusion: pairs is 'memory'; give one of"):
        chain_config.stage_configs(page)


def test_one_decoder_stage_trains_both_families():
    made = chain_config.stage_configs(chain_config.load("configs/cm3leon.py:chain"))
    shape = decoder.DecoderConfig(vocab_size=640, max_seq_len=300, **made["decoder"].model)
    expected = cm3leon.CM3LeonConfig.tiny()
    sizes = {"vocab_size": 640, "max_seq_len": 300}
    assert shape == dataclasses.replace(expected.decoder, **sizes)
    vocabulary = types.SimpleNamespace(size=600, code_offset=500)
    tokenizer = types.SimpleNamespace(vocabulary=vocabulary, grids=((8, 8),))
    layout = types.SimpleNamespace(num_positions=300)
    model = decoder_training.make_model_config(made["decoder"], tokenizer, layout)
    assert (model.alpha, model.sentinel_weight, model.normalize_by) == (1.0, 1.0, "weights")
    plain = chain_config.stage_configs(chain_config.load("configs/quickstart.py:tiny"))["decoder"]
    model = decoder_training.make_model_config(plain, tokenizer, layout)
    assert (model.alpha, model.sentinel_weight, model.normalize_by) == (0.1, 0.0, "main")


@pytest.mark.parametrize("preset", quickstart.PRESETS)
def test_a_presets_stages_share_seed_and_world(preset):
    page = chain_config.load(f"configs/quickstart.py:{preset}")
    made = chain_config.stage_configs(page)
    assert list(made) == list(quickstart.STAGES)
    assert len({config.world for config in made.values()}) == 1
    assert {config.seed for config in made.values()} == {0}
    assert made["evaluation"].generation == made["report"].generation == made["generation"]


def test_the_control_differs_in_its_documents_alone(config):
    made = chain_config.stage_configs(config)
    decoder, control = made["decoder"], made["control"]
    assert control == dataclasses.replace(decoder, is_baseline=True)
    assert decoder.layout(4).max_docs == 2 and control.layout(4).max_docs == 0


@pytest.mark.parametrize("key", ["stages", "seed", "world"])
def test_a_config_needs_what_every_stage_needs(config, key):
    del config[key]
    with pytest.raises(UserError, match=f"has no '?{key}'?"):
        chain_config.stage_configs(config)


@pytest.mark.parametrize(
    ("world", "stage", "says"),
    [
        ({}, "toy_pairs", "toy_pairs does not support the config's world, emoji scenes"),
        (
            {"modality_offset": 1.0},
            "tokenizer",
            "tokenizer does not support .*, a toy world of embeddings",
        ),
    ],
)
def test_a_stage_is_refused_in_a_world_it_cannot_work_in(config, world, stage, says):
    with pytest.raises(UserError, match=says):
        chain_config.stage_configs(config | {"world": world, "stages": [stage]})


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("decoder.model.layers", 3, "decoder.model has no setting 'layers'"),
        ("decoder.model.positions", "none", "decoder: model: positions are rope"),
        ("decoder.masking.prob", 2.0, "prob is 2.0"),
        ("decoder.sequences.num_docs_weights", [0.0, 0.0, 0.0], "num_docs_weights are"),
        ("decoder.sequences.captions_per_image", 0, "captions_per_image is 0"),
        ("retriever.model.num_heads", 3, "num_heads is 3, which does not divide"),
        ("retriever.model.patch_size", 5, "model.patch_size is 5"),
        ("tokenizer.model.image_size", 64, "image_size=64 does not fit"),
        ("tokenizer.model.encoder", "vit", "encoder='vit' is unknown"),
        ("generation.top_p", 0.0, "generation: temperature must be at least 0 and top_p"),
        ("generation.num_candidates", 0, "num_candidates is 0"),
        ("report.rows", 3, "report has no setting 'rows'"),
        ("decoder.scale.mesh", [2], "decoder.scale.mesh is .2.; give tuple"),
        ("decoder.model.head_dim", "wide", "model.head_dim is 'wide'; give int"),
        ("decoder.scale.mesh", [0, 1, 1], "mesh is .0, 1, 1.; give numbers of devices"),
        ("decoder.scale.dtype", "float16", "dtype is 'float16'; give one of float32, bfloat16"),
        ("decoder.scale.num_parts", 0, "num_parts is 0; give at least 1"),
        ("tokenizer.scale.remat", "dots", "remat is 'dots'; give one of none, full"),
        ("tokenizer.scale.mesh", [2, 1, 2], "split by batch only, so give 1 along tensor"),
        ("retriever.scale.num_parts", 2, "'num_parts': its loss compares the pairs of a batch"),
        ("decoder.model.smear_lags", [[1, "x"], []], "smear_lags is .*; give tuple"),
        ("decoder.alpha", -1.0, "alpha is -1.0; give at least 0"),
        ("neighbors.max_similarity", "much", "neighbors.max_similarity is 'much'; give float"),
        ("tokenizer.text.vocab_size", -5, "vocab_size is -5; give at least 256"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(config, tmp_path, path, value, says):
    *parents, last = path.split(".")
    node = changed = copy.deepcopy(config)
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(UserError, match=says):
        chain.run_chain(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_inputs_are_missing_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="no stage 'tokenizer'"):
        chain.run_chain(config, tmp_path / "run", only="control")
    config["stages"].remove("decoder")
    with pytest.raises(UserError, match="no stage 'decoder'"):
        chain.run_chain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_memory_wants_a_folder_of_a_file_system(config):
    with pytest.raises(UserError, match="not in gs://bucket/run; mount it"):
        chain.run_chain(config, "gs://bucket/run")


def test_the_baseline_may_have_its_own_model_and_optimizer():
    plain = {"model": {"smear_lags": (), "induction_init": False}, "optimizer": {"b2": 0.95}}
    page = chain_config.load("configs/quickstart.py:tiny")
    page = chain_config.override(page, {f"control.{part}": plain[part] for part in plain})
    configs = chain_config.stage_configs(page | {"control": page["control"] | {"num_steps": 80}})
    decoder, control = configs["decoder"], configs["control"]
    assert decoder.model["induction_init"] and not control.model["induction_init"]
    assert not control.look_back and len(decoder.look_back) == 4
    assert control.optimizer == dataclasses.replace(decoder.optimizer, b2=0.95)
    assert (decoder.loop.num_steps, control.loop.num_steps) == (40, 80)
    page["control"]["model"] = {"smear_lag": ()}
    with pytest.raises(UserError, match="control: model has no setting 'smear_lag'"):
        chain_config.stage_configs(page)


def test_the_control_follows_what_is_changed_of_the_decoder():
    changed = {"decoder.loop.num_steps": "60", "decoder.batch_size": "4"}
    config = chain_config.load("configs/quickstart.py:tiny", changed)
    configs = chain_config.stage_configs(config)
    alike = dataclasses.replace(configs["decoder"], is_baseline=True)
    assert configs["control"] == alike


@pytest.mark.parametrize(
    "override",
    [
        {"neighbors.captions_per_image": "2"},
        {"neighbors.num_neighbors": "1"},
        {"generation.num_held_out": "1000"},
        {"neighbors.num_test": "0"},
        {"decoder.model.num_heads": "0"},
        {"retriever.model.embed_dim": "0"},
        {"tokenizer.num_init_images": "1"},
    ],
)
def test_counts_that_do_not_fit_are_refused_before_anything_runs(override):
    config = chain_config.load("configs/quickstart.py:tiny", override)
    with pytest.raises(UserError):
        chain_config.stage_configs(config)
