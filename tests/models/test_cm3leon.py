"""CM3Leon's sizes and initialization, in both readings of "output layers are zero", and its uniform loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import configuration, sharding
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.models import cm3leon, ra_cm3
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import InitConfig
from rag_mm.perf.plan import chain_sizes
from rag_mm.train import optimizer, train_state, train_step

SIZES = {
    "configs/cm3leon.py:350m": (24, 1024, 16, 350e6),
    "configs/cm3leon.py:760m": (24, 1536, 16, 760e6),
    "configs/cm3leon.py:7b": (32, 4096, 32, 7e9),
    "configs/ra_cm3.py:2.7b": (32, 2560, 32, 2.7e9),
}


def make_model(config):
    return cm3leon.Model(config.decoder, rngs=nnx.Rngs(params=0))


def load_from_page(name):
    page = configuration.to_dict(configuration.load_config(name))
    values = chain_sizes.model_page(page)
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
    assert (config.alpha, config.sentinel_weight, config.normalize_by) == (1.0, 1.0, "weights")
    paper = ra_cm3.RACM3Config.b2_7()
    assert (paper.alpha, paper.sentinel_weight, paper.normalize_by) == (0.1, 0.0, "main")


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


VOCABULARY = vocabulary.train_vocabulary([], 256, 64, 4)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=8, num_codes=16, max_spans=2)
ROWS = cm3leon.make_config(
    1,
    32,
    2,
    vocab_size=VOCABULARY.size + VOCABULARY.size % 2,
    max_seq_len=LAYOUT.num_positions,
    code_offset=VOCABULARY.code_offset,
    dtype="float32",
)


def make_rows(nums_docs, rng):
    """A batch with one sequence for each number of documents; in every other one the caption is masked."""

    def example():
        text = rng.integers(256, size=rng.integers(3, 9)).tolist()
        return token_documents.pair(text, rng.integers(64, size=16).astype(np.int32))

    rows = []
    for i, num_docs in enumerate(nums_docs):
        main, *docs = (example() for _ in range(num_docs + 1))
        plain = sequences.lay_out(LAYOUT, VOCABULARY, main, docs)
        spans = plain.segments[-2:-1] if i % 2 else None
        rows.append(sequences.make_row(LAYOUT, VOCABULARY, main, docs, spans))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


LOSS = functools.partial(cm3leon.loss_fn, config=ROWS)
SGD = optax.sgd(1.0)


@functools.cache
def take_step(mesh_shape=(1, 1, 1), num_parts=1):
    """Parameters after a step of plain gradient descent, and the metrics."""
    batch = make_rows([0, 0, 2, 2, 1, 0, 2, 1], np.random.default_rng(1))
    batch["roles"][:2] = 0  # A part, and two shards, without targets.
    mesh = sharding.make_mesh(*mesh_shape)
    make = functools.partial(make_model, ROWS)
    graphdef, _ = param_trees.describe(make, mesh)
    step = train_step.make_train_step(graphdef, LOSS, SGD, 0, num_parts)
    state = train_state.init_state(param_trees.init_params(make, mesh), SGD, mesh)
    with jax.set_mesh(mesh):
        state, sums = step(state, sharding.put_batch(batch, mesh))
    return jax.device_get(state.params), {k: float(a / b) for k, (a, b) in sums.items() if b}


def test_loss_and_gradient_at_the_start_do_not_grow_with_the_number_of_documents():
    """So clipping and the guard mean the same for every number of them."""
    rng, norms = np.random.default_rng(0), []
    graphdef, params = nnx.split(make_model(ROWS), nnx.Param)

    @jax.jit
    def compute(batch):
        loss = lambda p: LOSS(nnx.merge(graphdef, p), batch, jax.random.key(0))[0]
        value, grads = jax.value_and_grad(loss)(params)
        return value, optax.global_norm(grads)

    for num_docs in range(3):
        loss, norm = compute(make_rows([num_docs] * 16, rng))
        assert float(loss) == pytest.approx(np.log(ROWS.decoder.vocab_size), abs=0.05)
        norms.append(float(norm))
    # Averages over more targets are less noisy; they are not sums over them.
    assert 0.5 < norms[2] / norms[0] < 1.1


@pytest.mark.parametrize("split", [dict(num_parts=4), dict(mesh_shape=(8, 1, 1))], ids=str)
def test_parts_and_shards_of_unequal_weight_add_up_to_the_whole_batch(split):
    params, metrics = take_step()
    other_params, other_metrics = take_step(**split)
    assert other_metrics == pytest.approx(metrics, abs=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), other_params, params)


def test_the_learning_rate_ends_at_a_tenth_of_its_peak():
    for preset in ("tiny", "7b"):
        values = configuration.to_dict(configuration.load_config(f"configs/cm3leon.py:{preset}"))
        page = chain_sizes.model_page(values)
        config = configuration.make(optimizer.OptimizerConfig, page["optimizer"], "optimizer")
        schedule = optimizer.make_schedule(config, page["num_steps"])
        last = float(schedule(page["num_steps"]))
        assert last == pytest.approx(0.1 * config.learning_rate, rel=1e-4)
