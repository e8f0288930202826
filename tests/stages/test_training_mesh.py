"""What a stage trains on: the mesh of its config, or all devices of processes that have joined."""

import jax
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import decoder
from rag_mm.perf import flops
from rag_mm.stages import training


def test_alone_it_is_the_configs():
    assert training.make_mesh(6).size == 1
    assert dict(training.make_mesh(8, (2, 2, 1)).shape) == {"data": 2, "fsdp": 2, "tensor": 1}


def test_of_processes_that_joined_all_devices_are_in_it(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert dict(training.make_mesh(8).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(training.make_mesh(8, (1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="its batch of 12 does not split over 8 devices"):
        training.make_mesh(12)
    with pytest.raises(UserError, match="fsdp=3, tensor=1 does not fit 8 devices"):
        training.make_mesh(12, (1, 3, 1))


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="data=16, fsdp=1, tensor=1 does not fit 8 devices"):
        training.make_mesh(16, (16, 1, 1))
    with pytest.raises(UserError, match="its batch of 6 does not split over 4 devices"):
        training.make_mesh(6, (4, 1, 1))


def test_a_steps_flops_are_those_of_its_segments():
    config = decoder.DecoderConfig(32, 1, 16, 2, 16, 8)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    cost = training.step_cost(model, sharding.make_mesh())
    found = cost.flops(np.array([[8.0, 0.0], [3.0, 4.0]]))
    by_hand = [[n * flops.train_flops(config, n) for n in row] for row in ((8, 0), (3, 4))]
    np.testing.assert_allclose(found, by_hand)
    # Half a row costs less than half of it: its tokens also attend to fewer.
    assert 2 * by_hand[1][1] < by_hand[0][0]
    assert training.step_cost(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), sharding.make_mesh()) is None
