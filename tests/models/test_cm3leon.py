"""CM3Leon's sizes and initialization, in both readings of "output layers are zero"."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import configuration, sharding
from rag_mm.models import cm3leon, ra_cm3
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import InitConfig

SIZES = {
    "configs/cm3leon.py:350m": (24, 1024, 16, 350e6),
    "configs/cm3leon.py:760m": (24, 1536, 16, 760e6),
    "configs/cm3leon.py:7b": (32, 4096, 32, 7e9),
    "configs/ra_cm3.py:2.7b": (32, 2560, 32, 2.7e9),
}


def make_model(config):
    return cm3leon.Model(config.decoder, rngs=nnx.Rngs(params=0))


def load_from_page(name):
    values = configuration.to_dict(configuration.load_config(name))
    family = {"cm3leon": cm3leon.CM3LeonConfig, "ra_cm3": ra_cm3.RACM3Config}[values["family"]]
    return configuration.make(family, values["model"], "model")


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_by_abstract_evaluation(name):
    config = load_from_page(name)
    layers, width, heads, num_params = SIZES[name]
    _, abstract = param_trees.describe(functools.partial(make_model, config), None)
    blocks = abstract["stack"]["blocks"]
    assert blocks["attention"]["q"]["kernel"].shape == (layers, width, heads, width // heads)
    assert blocks["mlp"]["up"]["kernel"].shape == (layers, width, 4 * width)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == pytest.approx(num_params, rel=0.17)  # The papers round: 350M is 373M.
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    names = {str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    if name.startswith("configs/cm3leon"):
        # No bias and no LayerNorm parameters anywhere, the final norm included.
        assert names == {"kernel", "table"}
        assert abstract["position_embedding"]["table"].shape == (4096, width)
    else:
        assert names == {"kernel", "table", "bias", "scale"}
        assert "position_embedding" not in abstract


def test_config_pages_equal_the_class_methods():
    for preset, config in {
        "tiny": cm3leon.CM3LeonConfig.tiny(),
        "350m": cm3leon.CM3LeonConfig.m350(),
        "760m": cm3leon.CM3LeonConfig.m760(),
        "7b": cm3leon.CM3LeonConfig.b7(),
    }.items():
        assert load_from_page(f"configs/cm3leon.py:{preset}") == config
    assert load_from_page("configs/ra_cm3.py:tiny") == ra_cm3.RACM3Config.tiny()
    assert config.alpha == 1.0 and ra_cm3.RACM3Config.b2_7().alpha == 0.1


@pytest.mark.parametrize("reading", ["blocks", "head"])
def test_weights_are_truncated_at_three_sigma_and_positions_are_small(reading):
    config = cm3leon.CM3LeonConfig.tiny(reading)
    make = functools.partial(make_model, config)
    params = param_trees.init_params(make, sharding.make_mesh())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sigma = 0.0002 if name.startswith("position_embedding") else 0.006
        is_output = name.endswith(("attention/out/kernel", "mlp/down/kernel"))
        if (reading == "blocks" and is_output) or (reading == "head" and name == "head/table"):
            assert (np.asarray(leaf) == 0).all(), name
            continue
        largest = float(np.abs(leaf).max())
        assert 2.7 * sigma < largest <= 3 * sigma * (1 + 1e-6), name
        # A normal distribution truncated at 3 sigma has standard deviation 0.9866 sigma.
        np.testing.assert_allclose(np.std(leaf), 0.9866 * sigma, rtol=0.02, err_msg=name)
    assert ("head" in params) == (reading == "head")


def loss_at_start(config, num_rows=4):
    rng = np.random.default_rng(0)
    length = config.decoder.max_seq_len
    tokens = rng.integers(config.decoder.vocab_size, size=(num_rows, length + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (num_rows, 1)),
        "segment_ids": np.ones((num_rows, length), np.int32),
        "roles": np.ones((num_rows, length), np.int8),
    }

    @jax.jit
    def compute(batch):
        model = make_model(config)
        loss, _ = cm3leon.loss_fn(model, batch, jax.random.key(0), config=config)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        embedded = model.norm(model.embed(batch["tokens"], batch["positions"]))
        return loss, hidden, embedded

    loss, hidden, embedded = compute(batch)
    return float(loss), np.asarray(hidden), np.asarray(embedded)


def test_zero_blocks_pass_the_embedding_through_and_a_token_predicts_itself():
    config = cm3leon.make_config(2, 512, 4, vocab_size=512, max_seq_len=64, dtype="float32")
    loss, hidden, embedded = loss_at_start(config)
    np.testing.assert_array_equal(hidden, embedded)
    # The logit of the input token is |e|^2 / std(e), about sigma d; the others have std sigma sqrt(d).
    sigma_d = 0.9866 * cm3leon.SIGMA * 512
    expected = np.log(512 + np.exp(sigma_d))
    assert loss == pytest.approx(expected, abs=0.05)
    assert loss > np.log(512) + 0.02


def test_a_zero_head_starts_at_exactly_log_v():
    loss, hidden, embedded = loss_at_start(cm3leon.CM3LeonConfig.tiny("head"))
    assert loss == pytest.approx(np.log(512), abs=1e-5)
    assert np.abs(hidden - embedded).max() > 0


def test_an_unknown_reading_and_a_tied_head_with_its_own_std_are_rejected():
    with pytest.raises(ValueError, match="zero_outputs"):
        cm3leon.CM3LeonConfig.tiny("both")
    with pytest.raises(ValueError, match="tied"):
        dataclasses.replace(cm3leon.CM3LeonConfig.tiny().decoder, init=InitConfig(head_std=0.0))
