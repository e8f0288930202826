"""What a decoder starts from: stages of the run, other runs and imported models, checked by shape."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from rag_mm.core import run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import decoder, lora, param_trees
from rag_mm.stages import chain_config
from rag_mm.stages.shared import starting_point
from rag_mm.train import checkpoint

CONFIG = decoder.DecoderConfig(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16, max_seq_len=6
)


def describe(config=CONFIG):
    return param_trees.describe(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)), None)[1]


def draw(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a trained decoder, and one with an imported Chameleon; and the parameters of both."""
    folder, params = tmp_path_factory.mktemp("runs"), draw(describe())

    def trained(run, stage_dir):
        checkpoint.save_params(stage_dir / "params", jax.tree.map(jax.numpy.asarray, params))
        return {}

    def imported(run, stage_dir):
        tree = param_trees.leaves_by_path(
            {"decoder": params, "vq": {"codebook": np.ones((2, 2), np.float32)}}
        )
        (stage_dir / "frozen").mkdir()
        safetensors.numpy.save_file(tree, stage_dir / "frozen" / "params.safetensors")
        return {}

    for name, stage, build in (
        ("trained", "decoder", trained),
        ("imported", "language_model", imported),
    ):
        run = run_folder.Run(epath.Path(folder / name))
        run_folder.run_stage(run, stage, {}, (), build)
    return folder, params


def start(start_from, workdir, **settings):
    return starting_point.StartConfig(start_from=str(start_from), **settings).start(
        epath.Path(workdir)
    )


@pytest.mark.parametrize("name", ["trained", "trained/decoder", "imported", "decoder"])
def test_parameters_come_from_a_run_a_stages_folder_or_a_stage(runs, name):
    folder, params = runs
    place = name if name == "decoder" else folder / name
    found = start(place, folder / "trained")(describe())
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_updates_of_low_rank_are_not_looked_for(runs):
    folder, params = runs
    config = starting_point.StartConfig(start_from=str(folder / "trained"), lora=lora.LoRAConfig())
    make = config.extend(lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(0)), 0)
    abstract = param_trees.describe(make, None)[1]
    assert any(map(lora.is_added, param_trees.leaves_by_path(abstract)))
    found = config.start(epath.Path(folder))(abstract)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("name", ["trained", "imported"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(vocab_size=32), r"embedding/table is \[16, 8\] there and \[32, 8\] here"),
        (dict(use_bias=True), "it lacks stack/blocks/attention/k/bias.* and 3 more"),
        (dict(tie_embeddings=True), "it also has head/table"),
    ],
)
def test_a_model_of_other_parameters_is_refused_with_their_names(runs, name, change, says):
    folder, _ = runs
    abstract = describe(dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match=says):
        start(folder / name, folder)(abstract)


def test_a_folder_without_a_decoder_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="holds no decoder"):
        start(tmp_path, tmp_path)
    run = run_folder.Run(epath.Path(tmp_path))
    run_folder.run_stage(run, "memory", {}, (), lambda run, stage_dir: {})
    with pytest.raises(UserError, match="has no decoder's parameters"):
        start(tmp_path / "memory", tmp_path)(describe())


def load(**overrides):
    page = chain_config.load("configs/quickstart.py:tiny", overrides)
    return chain_config.stage_configs(page)


def test_the_manifest_records_the_fingerprint_of_a_folder(runs):
    folder, _ = runs
    made = load(**{"decoder.start_from": str(folder / "trained")})
    fingerprint = run_folder.Run(epath.Path(folder / "trained")).manifest("decoder").fingerprint
    recorded = chain_config.slice_of(made["decoder"])
    assert recorded["started_from"] == fingerprint
    assert chain_config.STAGES["decoder"].inputs_for(made["decoder"]) == (
        "tokenizer",
        "memory",
        "neighbors",
    )
    plain = chain_config.slice_of(load()["decoder"])
    names = {field.name for field in dataclasses.fields(starting_point.StartConfig)}
    assert not names & plain.keys()  # Finished runs stay finished.


def test_a_stage_that_another_starts_from_is_its_input_and_trained_whole():
    made = load(
        **{"decoder.start_from": "control", "decoder.lora": '{"rank": 4, "targets": ["q"]}'}
    )
    assert made["decoder"].lora == lora.LoRAConfig(rank=4, targets=("q",))
    inputs = chain_config.STAGES["decoder"].inputs_for(made["decoder"])
    assert inputs == ("tokenizer", "memory", "neighbors", "control")
    assert made["control"].start_from is None and made["control"].lora is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"lora": "{'rank': 4}"}, "name one with start_from"),
        ({"lora": "on", "start_from": "control"}, "lora is 'on'; give None or its settings"),
        ({"lora": "{'rnk': 4}", "start_from": "control"}, "no setting 'rnk'"),
        ({"lora": "{}", "start_from": "control", "freeze": "head/*"}, "leave freeze out"),
        ({"frozen_dtype": "bfloat16"}, "nothing is frozen"),
        ({"frozen_dtype": "int8", "freeze": "head/*"}, "frozen_dtype is 'int8'"),
        ({"start_from": "decoder"}, "the stage itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        load(**{f"decoder.{key}": value for key, value in overrides.items()})


def test_what_is_frozen_follows_from_patterns_or_from_lora():
    abstract = describe()
    config = starting_point.StartConfig(freeze=("embedding/*",), frozen_dtype="bfloat16")
    what = config.what_trains(abstract)
    assert what.is_frozen("embedding/table") and not what.is_frozen("head/table")
    assert what.frozen_dtype == "bfloat16"
    narrow = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, "bfloat16"), abstract)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(config.merge(narrow))} == {"float32"}
    with pytest.raises(UserError, match="freeze has the pattern 'tail/"):
        starting_point.StartConfig(freeze=("tail/*",)).what_trains(abstract)
    adapted = starting_point.StartConfig(start_from="control", lora=lora.LoRAConfig())
    is_frozen = adapted.what_trains(abstract).is_frozen
    assert is_frozen("head/table") and not is_frozen("stack/blocks/attention/q/lora_a")


def test_rows_of_further_tokens_are_the_mean_of_the_others(runs):
    folder, params = runs
    longer = describe_on_mesh(dataclasses.replace(CONFIG, vocab_size=21))
    found = starting_point.load_longer(folder / "imported" / "language_model", longer, 16)
    for table in ("embedding", "head"):
        old, new = np.split(np.asarray(found[table]["table"]), [16])
        np.testing.assert_array_equal(old, params[table]["table"])
        np.testing.assert_allclose(new, np.tile(old.mean(0), (5, 1)), rtol=1e-6)
    np.testing.assert_array_equal(found["norm"]["scale"], params["norm"]["scale"])
    with pytest.raises(UserError, match="embedding/table is .16, 8. there and .15, 8. here"):
        starting_point.load_longer(folder / "imported" / "language_model", longer, 15)


def describe_on_mesh(config):
    make = lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))
    return param_trees.describe(make, sharding.make_mesh())[1]
