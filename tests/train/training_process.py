"""One process of a run on eight devices in total; `test_processes` starts them."""

import itertools
import json
import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from killed_runs import RecordingIterator
from test_loop import make_example

from rag_mm.core import processes, sharding
from rag_mm.data import pipeline
from rag_mm.nn import param_trees
from rag_mm.train import loop, optimizer, throughput, train_state, train_step

NUM_DEVICES, BATCH = 8, 8
# One parameter entry per device, so that every process has part of the parameters and moments.
MESH = (1, NUM_DEVICES, 1)


class Wide(nnx.Module):
    """y = the sum of x, fitted with eight parameters."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.full((NUM_DEVICES,), 0.5), axes=("embed",))


def loss_fn(model, batch, rng):
    kernel = sharding.gather(model.kernel[...], ("embed",))
    noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
    error = batch["x"].sum(1) * kernel.sum()[None] + noise - batch["y"]
    return jnp.square(error).mean(), {"loss": (jnp.square(error).sum(), jnp.float32(len(error)))}


def make_state(mesh):
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=2), 8)
    return train_state.init_state(param_trees.init_params(Wide, mesh), tx, mesh)


def make_row(index, rng):
    """An example with up to ten tokens."""
    ids = (np.arange(10) < index % 11).astype(np.int32)
    return make_example(index, rng) | {"tokens": 0 * ids, "segment_ids": ids}


def make_batches(rows=None):
    return pipeline.make_batches(range(20), BATCH, 1, make_row, rows=rows)


def main(folder: pathlib.Path, me: int, num_steps: int, what: str) -> None:
    # A step takes as long as the clock is asked: what is logged of speed follows from the batches alone.
    throughput.time = types.SimpleNamespace(monotonic=itertools.count().__next__)
    mesh = sharding.make_mesh(*MESH)
    graphdef, _ = param_trees.describe(Wide, mesh)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=2), 8)
    batches = RecordingIterator(make_batches(sharding.local_rows(BATCH, mesh)))
    step_fn, count = train_step.make_train_step(graphdef, loss_fn, tx, seed=0), 0

    def slow_step(state, batch):
        nonlocal count
        count += 1
        if what == "slow":
            (folder / f"here-{me}").write_text(str(count))
            time.sleep(0.2)
        return step_fn(state, batch)

    class Stuck(RecordingIterator):
        def __next__(self):
            if len(self.order) == 2:
                time.sleep(1000)
            return super().__next__()

    if what == "stuck" and me == 1:
        loop.STALL_SECONDS = 8.0
        batches = Stuck(make_batches(sharding.local_rows(BATCH, mesh)))
    _, rows = loop.fit(
        "wide",
        make_state(mesh),
        slow_step,
        batches,
        mesh,
        folder / "run",
        loop.LoopConfig(num_steps=num_steps, log_every=2, checkpoint_every=4),
        extras=loop.Extras(cost=throughput.Cost(lambda lengths: lengths**2)),
    )
    result = {"rows": rows, "order": batches.order}
    (folder / f"result-{me}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    folder, me, count, port, num_steps, what = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // int(count))
    if int(count) > 1:
        processes.join(f"localhost:{port}", int(count), int(me))
    main(pathlib.Path(folder), int(me), int(num_steps), what)
