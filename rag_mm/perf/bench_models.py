"""Our training step and our decoding beside transformers: one shape, one process, rounds by turns."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from rag_mm.core import clock, roles, sharding
from rag_mm.decode import sampler
from rag_mm.models import ra_cm3
from rag_mm.nn import params as params_lib
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.perf import timing, torch_peer
from rag_mm.train import guard
from rag_mm.train import state as state_lib
from rag_mm.train import step as step_lib

_LEARNING_RATE = 2e-3
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; the defaults are the quickstart's decoder when this was first measured.

    Attributes:
        widths: of the decoder, a case each; heads and MLP grow with it.
        num_layers, vocab_size: of the decoder.
        length: tokens of a row.
        batch_size: rows of a training step.
        batch_sizes: of decoding, a case each.
        num_new: tokens that are decoded at the end of a row; the rest is the prompt.
        num_threads: of both sides.
        num_rounds: of which the median counts.
        with_compiled: torch.compile as a peer too; it needs a C++ compiler.
    """

    widths: tuple[int, ...] = (192, 768)
    num_layers: int = 4
    vocab_size: int = 2_944
    length: int = 152
    batch_size: int = 48
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    num_new: int = 64
    num_threads: int = 2
    num_rounds: int = 5
    with_compiled: bool = True

    def decoder(self, width: int) -> DecoderConfig:
        """LLaMA's family in float32: heads of 32, a gated MLP of 8/3 the width."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            embed_dim=width,
            num_heads=max(width // 32, 1),
            mlp_dim=width * 8 // 3,
            max_seq_len=self.length,
        )


def train(config: Config, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """Tokens a second of a step of Adam, prepared batch to new parameters; a case a width and peer.

    The peer of `WIDTH_guard` is our own step without `train.guard`, in the same rounds: its ratio says what
    the guard costs.
    """
    with _threads(config.num_threads):
        return _with_machine(config, _train(config, say))


def decode(config: Config, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """New tokens a second, greedy, prefill included; a case a batch size.

    `two_streams` is what a second row costs at batch 1, as guidance by a second stream would: seconds of
    two over seconds of one.
    """
    with _threads(config.num_threads):
        return _with_machine(config, _decode(config, say))


def _train(config: Config, say: Say) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.length)
    ids = rng.integers(1, config.vocab_size, shape).astype(np.int32)
    for width in config.widths:
        say(f"training, {width} wide")
        decoder = config.decoder(width)
        kinds = {"eager": False} | ({"compiled": True} if config.with_compiled else {})
        peers = [
            torch_peer.make_train_step(decoder, _LEARNING_RATE, config.num_threads, is_compiled)
            for is_compiled in kinds.values()
        ]
        calls = [_make_train_step(decoder, None), _make_train_step(decoder, guard.Config()), *peers]
        losses = [call(ids) for call in calls]
        seconds = timing.alternate(
            [functools.partial(call, ids) for call in calls], config.num_rounds
        )
        rates = [ids.size / each for each in seconds]
        cases[f"{width}_guard"] = _ratio(rates[1], rates[0], "tokens/s")
        for kind, rate, loss in zip(kinds, rates[2:], losses[2:], strict=True):
            cases[f"{width}_{kind}"] = {
                **_ratio(rates[0], rate, "tokens/s"),
                "our_loss": losses[0],
                "peer_loss": loss,
            }
    return cases


def _make_train_step(
    decoder: DecoderConfig, guarded: guard.Config | None
) -> Callable[[np.ndarray], float]:
    """The house's own step on a mesh of one device: ids -> the loss before it."""
    mesh = sharding.make_mesh()
    make_model = functools.partial(_make_model, decoder)
    graphdef, _ = params_lib.describe(make_model, mesh)
    adam: optax.GradientTransformation = optax.adam(_LEARNING_RATE)
    if guarded is not None:
        adam = guard.guard(adam, guarded)
    loss_fn = functools.partial(
        ra_cm3.loss_fn, config=ra_cm3.Config(decoder, code_offset=decoder.vocab_size)
    )
    step_fn = step_lib.make_train_step(graphdef, loss_fn, adam, seed=0)
    state = state_lib.init_state(params_lib.init_params(make_model, mesh), adam, mesh)

    def step(ids: np.ndarray) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, sums = step_fn(state, sharding.put_batch(_as_rows(ids), mesh))
        total, weight = jax.device_get(jax.block_until_ready((sums, state))[0]["loss"])
        return float(total / weight)

    return step


def _as_rows(ids: np.ndarray) -> dict[str, np.ndarray]:
    """One document a row, every token of it a target but the first."""
    kinds = np.full(ids.shape, roles.MAIN, np.int8)
    kinds[:, -1] = roles.IGNORED
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {
        "tokens": ids,
        "targets": np.roll(ids, -1, axis=1),
        "positions": positions,
        "segment_ids": np.ones_like(ids),
        "roles": kinds,
    }


def _decode(config: Config, say: Say) -> dict[str, dict[str, Any]]:
    decoder = config.decoder(config.widths[0])
    ours, theirs = _make_generate(decoder), torch_peer.make_generate(decoder, config.num_threads)
    rng, count, cases = np.random.default_rng(0), config.num_new, {}

    def prompts(batch_size: int) -> np.ndarray:
        shape = (batch_size, config.length - count)
        return rng.integers(1, config.vocab_size, shape).astype(np.int32)

    for batch_size in config.batch_sizes:
        say(f"decoding {batch_size} rows")
        given = prompts(batch_size)
        calls = [functools.partial(generate, given, count) for generate in (ours, theirs)]
        seconds = timing.alternate(calls, config.num_rounds)
        rates = [batch_size * count / each for each in seconds]
        cases[f"batch_{batch_size}"] = _ratio(rates[0], rates[1], "tokens/s")
    calls = [functools.partial(ours, prompts(rows), count) for rows in (2, 1)]
    two, one = timing.alternate(calls, 2 * config.num_rounds)
    cases["two_streams"] = _ratio(two, one, "s")
    return cases


def _make_generate(decoder: DecoderConfig) -> Callable[[np.ndarray, int], np.ndarray]:
    make_model = functools.partial(_make_model, decoder)
    graphdef, _ = params_lib.describe(make_model, None)
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1]))()
    allowed = np.ones(decoder.vocab_size, bool)

    def generate(prompts: np.ndarray, count: int) -> np.ndarray:
        rows, length = prompts.shape
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), prompts.shape)
        given = sampler.Prompts(
            prompts, positions, np.ones_like(prompts), np.full(rows, length, np.int32)
        )
        drawn = sampler.sample(
            params,
            given,
            np.arange(rows, dtype=np.uint32),
            allowed,
            graphdef=graphdef,
            num_steps=count,
            sampling=sampler.Sampling(temperature=0.0),
        )
        return np.asarray(drawn.tokens)

    return generate


def _make_model(decoder: DecoderConfig) -> ra_cm3.Model:
    return ra_cm3.Model(decoder, rngs=nnx.Rngs(params=0))


def _ratio(ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    # XLA makes as many threads as it may use processors when it starts.
    used = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, used[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, used)


def _with_machine(
    config: Config, cases: Mapping[str, dict[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    made_on = clock.machine()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    common = {
        "machine": f"{made_on['processor']}, {config.num_threads} of {made_on['cores']} cores",
        "versions": torch_peer.versions() | versions,
        "xla_flags": made_on["xla_flags"],
    }
    return {name: {**case, **common} for name, case in cases.items()}
