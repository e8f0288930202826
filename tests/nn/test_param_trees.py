"""Every parameter's sharding follows from its logical axes; sharded initialization gives the same bits."""

import dataclasses

import jax
import naive_decoder
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import decoder, param_trees

CONFIG = decoder.DecoderConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=12,
    max_seq_len=6,
    norm="layernorm",
    positions="learned",
    qk_norm=True,
    use_bias=True,
)
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "4x2x1": (4, 2, 1), "2x2x2": (2, 2, 2)}
# The shardings of the Megatron and FSDP papers, axis by axis.
SPECS = {
    "embedding/table": P("tensor", "fsdp"),
    "head/table": P("tensor", "fsdp"),
    "position_embedding/table": P(None, "fsdp"),
    "norm/scale": P(None),
    "norm/bias": P(None),
    **{f"stack/blocks/attention/{n}/kernel": P(None, "fsdp", "tensor", None) for n in "qkv"},
    **{f"stack/blocks/attention/{n}/bias": P(None, "tensor", None) for n in "qkv"},
    "stack/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "stack/blocks/attention/out/bias": P(None, "fsdp"),
    "stack/blocks/attention/q_norm/scale": P(None, None),
    "stack/blocks/attention/k_norm/scale": P(None, None),
    **{f"stack/blocks/mlp/{n}/kernel": P(None, "fsdp", "tensor") for n in ("gate", "up")},
    **{f"stack/blocks/mlp/{n}/bias": P(None, "tensor") for n in ("gate", "up")},
    "stack/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "stack/blocks/mlp/down/bias": P(None, "fsdp"),
    **{
        f"stack/blocks/{n}_norm/{which}": P(None, None)
        for n in ("attention", "mlp")
        for which in ("scale", "bias")
    },
}


def make_model():
    return naive_decoder.make_model(CONFIG)


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def made():
    """New parameters on one device and on eight; a config with fewer random numbers compiles faster."""
    config = dataclasses.replace(CONFIG, positions="rope", tie_embeddings=True, mlp="gelu")
    make_model = lambda: naive_decoder.make_model(config)
    return {
        name: param_trees.init_params(make_model, sharding.make_mesh(*MESHES[name]))
        for name in ("1", "2x2x2")
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_every_parameter_has_the_spec_of_its_logical_axes(mesh):
    _, abstract = param_trees.describe(make_model, sharding.make_mesh(*MESHES[mesh]))
    leaves = by_name(abstract)
    assert leaves.keys() == SPECS.keys()
    for name, leaf in leaves.items():
        assert leaf.sharding.spec == SPECS[name], name
        assert leaf.dtype == np.float32, name


def test_parameters_are_initialized_sharded_and_do_not_depend_on_the_mesh(made):
    one, eight = by_name(made["1"]), by_name(made["2x2x2"])
    for name, leaf in eight.items():
        assert leaf.sharding.spec == SPECS[name], name
        num_shards = 2 ** sum(axis is not None for axis in SPECS[name])
        assert leaf.addressable_shards[0].data.size == leaf.size // num_shards, name
        # The last bit of what is computed from the same draws may differ with a shard's length.
        np.testing.assert_array_max_ulp(np.asarray(leaf), np.asarray(one[name]), maxulp=2)


def test_layers_and_matrices_start_different_with_their_own_standard_deviation(made):
    leaves = by_name(made["1"])
    kernel = np.asarray(leaves["stack/blocks/attention/q/kernel"])
    assert not np.array_equal(kernel[0], kernel[1])
    assert kernel.std() == pytest.approx(0.02, rel=0.3)
    # Projections that write to the residual stream are smaller by sqrt(2 L).
    down = np.asarray(leaves["stack/blocks/mlp/down/kernel"])
    assert down.std() == pytest.approx(0.02 / 2, rel=0.3)
    for name, leaf in leaves.items():
        if name.endswith("scale"):
            assert (np.asarray(leaf) == 1).all(), name
        elif name.endswith("bias"):
            assert (np.asarray(leaf) == 0).all(), name


def test_describing_allocates_no_array_even_at_seven_billion_parameters():
    large = decoder.DecoderConfig(
        vocab_size=65_536,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=16_384,
        max_seq_len=4096,
        norm="layernorm_no_params",
        positions="learned",
        mlp="gelu",
        tie_embeddings=True,
    )
    mesh = sharding.make_mesh(1, 4, 2)
    _, abstract = param_trees.describe(lambda: naive_decoder.make_model(large), mesh)
    leaves = jax.tree.leaves(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == pytest.approx(6.7e9, rel=0.02)
    assert abstract["stack"]["blocks"]["mlp"]["up"]["kernel"].sharding.spec == P(
        None, "fsdp", "tensor"
    )


def test_too_few_devices_are_an_error():
    with pytest.raises(ValueError, match="devices"):
        sharding.make_mesh(16)


TREE = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


@pytest.mark.parametrize(
    ("patterns", "chosen", "others"),
    [
        (("a/*",), {"a": {"b": 1, "c": {"d": 2}}}, {"e": 3}),
        (("*/d", "e"), {"a": {"c": {"d": 2}}, "e": 3}, {"a": {"b": 1}}),
        (("*",), TREE, {}),
        ((), {}, TREE),
    ],
)
def test_patterns_split_a_tree_in_two_that_join_to_it(patterns, chosen, others):
    found = param_trees.split(TREE, param_trees.matching(patterns, TREE, "freeze"))
    assert found == (chosen, others)
    assert param_trees.join(*found) == param_trees.join(*reversed(found)) == TREE


def test_of_two_values_the_later_one_is_joined():
    assert param_trees.join(TREE, {"a": {"b": 5}, "f": 6}) == {
        **TREE,
        "a": {**TREE["a"], "b": 5},
        "f": 6,
    }
    assert TREE["a"]["b"] == 1


def test_a_pattern_that_matches_nothing_is_refused_with_the_paths():
    with pytest.raises(UserError, match=r"freeze has .*'a/x'.* parameters are a/b, a/c/d, e\."):
        param_trees.matching(("e", "a/x"), TREE, "freeze")


def test_given_parameters_are_kept_and_the_others_are_those_of_the_seed(made):
    config = dataclasses.replace(CONFIG, positions="rope", tie_embeddings=True, mlp="gelu")
    given = {"norm": jax.tree.map(lambda leaf: leaf + 1, made["1"]["norm"])}
    found = param_trees.init_params(
        lambda: naive_decoder.make_model(config), sharding.make_mesh(), given
    )
    assert found["norm"]["scale"] is given["norm"]["scale"]
    jax.tree.map(np.testing.assert_array_equal, found, param_trees.join(made["1"], given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["1", "2x2x2"])
def test_a_sum_of_bits_tells_a_change_of_any_bit_and_an_exchange(dtype, mesh):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(jax.numpy.dtype(dtype))
    layout = jax.sharding.NamedSharding(sharding.make_mesh(*MESHES[mesh]), P("fsdp", "tensor"))

    def sums(changed):
        return param_trees.bit_sums({"a": {"b": jax.device_put(changed, layout)}})

    before = sums(values)
    assert before == sums(values.copy()) and list(before) == ["a/b"]
    for place in np.ndindex(values.shape):
        for bit in (0, 8 * values.dtype.itemsize - 1):
            changed = values.copy()
            changed.view(f"uint{8 * values.dtype.itemsize}")[place] ^= 1 << bit
            assert sums(changed) != before
    exchanged = values.copy()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    assert sums(exchanged) != before
