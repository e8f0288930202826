"""Our side of the benchmarks: the training step and greedy decoding as plain functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rag_mm.core import costs, roles, sharding
from rag_mm.decode import sampler
from rag_mm.models import ra_cm3
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.train import train_state, train_step


def make_rows(rng: np.random.Generator, shape: tuple[int, int], vocab_size: int) -> dict:
    """A batch [B, T] of random ids above 0: one document each, all tokens but the first are targets."""
    ids = rng.integers(1, vocab_size, shape).astype(np.int32)
    token_roles = np.full(shape, roles.MAIN, np.int8)
    token_roles[:, -1] = roles.IGNORED
    return {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=1),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones_like(ids),
        "roles": token_roles,
    }


def make_train_step(
    config: ra_cm3.RACM3Config, optimizer: optax.GradientTransformation
) -> Callable[..., float]:
    """`train.train_step` with RA-CM3's loss on a mesh of one device, starting from new parameters.

    Returns:
        (batch of host arrays [B, T], num_steps = 1) -> the loss before the last of `num_steps` steps on this
        batch, in nats per target. Blocks until the new parameters are ready.
    """
    mesh = sharding.make_mesh()
    make_model = functools.partial(_make_model, config.decoder)
    graphdef, _ = param_trees.describe(make_model, mesh)
    loss_fn = functools.partial(ra_cm3.loss_fn, config=config)
    step_fn = train_step.make_train_step(graphdef, loss_fn, optimizer, seed=0)
    state = train_state.init_state(param_trees.init_params(make_model, mesh), optimizer, mesh)

    def step(batch: Mapping[str, np.ndarray], num_steps: int = 1) -> float:
        nonlocal state
        # The gradient of bfloat16 attention mixes dtypes.
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
            placed = sharding.put_batch(dict(batch), mesh)
            for _ in range(num_steps):
                state, sums = step_fn(state, placed)
        total, weight = jax.device_get(jax.block_until_ready((sums, state))[0]["loss"])
        return float(total / weight)

    return step


def make_generate(
    decoder: DecoderConfig, weights: str = "float32"
) -> Callable[[np.ndarray, int], np.ndarray]:
    """(prompts int [B, T], count) -> int [B, count], greedy tokens; `weights` is the parameters' dtype."""
    make_model = functools.partial(_make_model, decoder)
    graphdef, _ = param_trees.describe(make_model, None)

    @jax.jit
    def init() -> param_trees.Params:
        params = nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1])
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(weights)), params)

    params, allowed = init(), np.ones(decoder.vocab_size, bool)

    def generate(prompts: np.ndarray, count: int) -> np.ndarray:
        rows, length = prompts.shape
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), prompts.shape)
        batch = sampler.Prompts(
            prompts, positions, np.ones_like(prompts), np.full(rows, length, np.int32)
        )
        samples = sampler.sample(
            params,
            batch,
            np.arange(rows, dtype=np.uint32),
            allowed,
            graphdef=graphdef,
            num_steps=count,
            sampling=sampler.Sampling(temperature=0.0),
        )
        return np.asarray(samples.tokens)

    return generate


def with_machine(
    cases: Mapping[str, dict[str, Any]],
    num_threads: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Mapping[str, Any]]:
    """Adds `machine`, `versions` (ours and the given ones) and `xla_flags` to the cases.

    The machine is described by its processor and the number of cores used, or, without `num_threads`, by the
    first device.
    """
    made_on = costs.machine()
    device = jax.devices()[0].device_kind
    where = device if num_threads is None else f"{num_threads} of {made_on['cores']} cores"
    common = {
        "machine": f"{made_on['processor']}, {where}",
        "versions": {**made_on["versions"], **(versions or {})},
        "xla_flags": made_on["xla_flags"],
    }
    return {name: {**case, **common} for name, case in cases.items()}


def _make_model(decoder: DecoderConfig) -> ra_cm3.Model:
    return ra_cm3.Model(decoder, rngs=nnx.Rngs(params=0))
