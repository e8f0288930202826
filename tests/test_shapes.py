"""Shapes and dtypes in annotations are checked at run time in tests, and only there."""

import json
import pathlib

import fresh_python
import jax.numpy as jnp
import jaxtyping
import pytest

from rag_mm.decode import cache
from rag_mm.models import reco
from rag_mm.nn import conv
from rag_mm.ops import losses

WRONG_CALLS = {
    "ops": lambda: losses.token_nll(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), jnp.int32)),
    "nn": lambda: conv.average_pool(jnp.zeros((4, 4, 3))),
    "models": lambda: reco.mean_fusion(
        jnp.zeros((2, 8)), jnp.zeros((2, 3, 8)), jnp.zeros((2, 4), bool)
    ),
    "decode": lambda: cache.make_attend(jnp.int32(0), jnp.zeros(5, jnp.int32)),
}


@pytest.mark.parametrize("package", WRONG_CALLS)
def test_a_wrong_shape_raises_in_tests(package):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"rag_mm.{package}"):
        WRONG_CALLS[package]()


def test_a_wrong_dtype_raises_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="logits"):
        losses.token_nll(jnp.zeros((2, 3, 5), jnp.bfloat16), jnp.zeros((2, 3), jnp.int32))


def test_outside_of_tests_nothing_is_checked_at_no_cost():
    """Functions there are the plain ones of their files, not wrappers that check."""
    done = fresh_python.run(fresh_python.PROGRAMS / "unchecked_shapes.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["shape"] == [1, 2, 2, 3]
    assert [pathlib.Path(file).name for file in result["files"]] == [
        "images.py",
        "conv.py",
        "reco.py",
        "cache.py",
    ]
    assert not result["has_checker"]
