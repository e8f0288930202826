"""bfloat16 activations times float32 parameters: gradients are float32, in the parameter's sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rag_mm.core import sharding
from rag_mm.ops import projection

AXES = ("embed", "heads", None)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 6, 16)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(16, 4, 3)), jnp.float32)
IDS = RNG.integers(24, size=(8, 6)).astype(np.int32)
TABLE = jnp.asarray(RNG.normal(size=(24, 16)), jnp.float32)


def project_loss(kernel, x, dtype):
    y = projection.project(x.astype(dtype), kernel, AXES, 1)
    return jnp.square(y.astype(jnp.float32)).sum()


def float32_project_loss(kernel, x, dtype):
    y = projection.project(x.astype(dtype), kernel, AXES, 1, out_dtype=jnp.float32)
    return jnp.square(y).sum()


def look_up_loss(table, ids, dtype):
    rows = projection.look_up(ids, table, dtype)
    return jnp.square(rows.astype(jnp.float32)).sum()


CASES = {
    "project": (project_loss, KERNEL, X, AXES, ("batch", None, None)),
    "project_to_float32": (float32_project_loss, KERNEL, X, AXES, ("batch", None, None)),
    "look_up": (look_up_loss, TABLE, IDS, ("vocab", "embed"), ("batch", None)),
}


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 8, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_float32_sums_in_the_parameters_sharding(case, shape):
    """bfloat16 activations against float32 ones; eight devices under fsdp reduce in two rounds."""
    loss, parameter, x, axes, layout = CASES[case]
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    expected = grad(parameter, x, jnp.float32)
    if shape is None:
        found = grad(parameter, x, jnp.bfloat16)
    else:
        mesh = sharding.make_mesh(*shape)
        spec = sharding.parameter_spec(axes)
        parameter = jax.device_put(parameter, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, sharding.activation_spec(*layout)))
            lowered = grad.lower(parameter, x, jnp.bfloat16)
            program = lowered.compile()
            found = program(parameter, x)
        assert found.sharding.spec == spec
        assert "reduce-scatter" in program.as_text()
        # In the program before XLA widens types for the CPU: the sums themselves are float32.
        types = re.findall(r"tensor<[\dx]*x(\w+)>", lowered.as_text().split("reduce_scatter")[1])
        assert next(dtype for dtype in types if dtype != "i64") == "f32"  # i64: lists of devices.
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() > 0  # It was bfloat16.


def test_gradients_of_many_lookups_of_one_row_are_summed_in_float32():
    """768 ones; a bfloat16 sum would stop at 256."""
    table, ids = jnp.zeros((2, 4)), jnp.zeros((256, 3), jnp.int32)
    loss = lambda table: projection.look_up(ids, table, jnp.bfloat16).astype(jnp.float32).sum()
    assert jax.grad(loss)(table)[0].tolist() == [768.0] * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_the_plain_product(dtype):
    y = projection.project(X.astype(dtype), KERNEL, AXES, 1)
    assert y.dtype == dtype
    expected = np.einsum("bti,inh->btnh", np.asarray(X), np.asarray(KERNEL))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=tolerance * 10)
    rows = projection.look_up(IDS, TABLE, dtype)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(TABLE.astype(dtype))[IDS])
