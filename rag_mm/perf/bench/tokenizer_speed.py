"""The image tokenizer compared with a port to PyTorch: same weights and process, interleaved rounds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.models.spae import autoencoder, objective
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize
from rag_mm.perf.bench import ours, timing, torch_peer, torch_tokenizer
from rag_mm.train import train_state, train_step

LEARNING_RATE = 1e-4
TOLERANCE = 1e-4  # of embeddings, images and losses, in units of the peer's largest value
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TokenizerBenchConfig:
    """Configuration of the benchmark.

    Attributes:
        model: sizes of the image tokenizer; convolutions at one pixel a patch and a learned codebook.
        batch_size: images at a time.
        num_words, word_dim: codes, and their width, of the language codebook whose search is timed.
        num_threads: threads of both sides.
        num_rounds: timing rounds; the median is reported.
    """

    model: SPAEConfig
    batch_size: int = 2
    num_words: int = 65_536
    word_dim: int = 128
    num_threads: int = 2
    num_rounds: int = 5


def run(config: TokenizerBenchConfig, say: Say = lambda line: None) -> dict[str, Any]:
    """Images per second of `encode`, `decode` and `train_step`, and the share of a large codebook's search.

    `error` of a case is the largest difference of the two results, in units of the peer's largest value.
    In the case `quantizer` `ours` are the seconds of quantizing a batch by `num_words` words of `word_dim`
    dimensions, `peer` those of our encoder.

    Raises:
        UserError: torch is not installed, or the two sides' results differ by more than `TOLERANCE`.
    """
    with timing.on_threads(config.num_threads):
        cases = _Sides(config).compare(say)
        say("quantizer")
        cases["quantizer"] = _quantizer_share(config)
    return ours.with_machine(cases, config.num_threads, torch_peer.versions())


class _Sides:
    """Both sides' functions of the same images."""

    def __init__(self, config: TokenizerBenchConfig):
        self.config, model = config, config.model
        shape = (config.batch_size, model.image_size, model.image_size, 3)
        self.pixels = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
        self.graphdef, self.params = _init(model)
        self.peer = torch_tokenizer.TorchTokenizer(model, self.params, config.num_threads)
        images = np.asarray(image_ops.to_float(self.pixels)).transpose(0, 3, 1, 2)
        self.images = self.peer.torch.from_numpy(np.ascontiguousarray(images))

    def compare(self, say: Say) -> dict[str, dict[str, Any]]:
        """The three cases."""
        cases = {}
        for name, make in (("encode", self._encode), ("decode", self._decode)):
            say(name)
            calls, error = make()
            cases[name] = self._time(calls, check(name, error))
        say("training step")
        calls, error = self._train()
        cases["train_step"] = self._time(calls, check("train_step", error))
        return cases

    def _time(self, calls: list[Callable[[], object]], error: float) -> dict[str, Any]:
        seconds = timing.alternate(calls, self.config.num_rounds, is_warm=True)
        mine, theirs = (self.config.batch_size / each for each in seconds)
        return {
            "ours": mine,
            "peer": theirs,
            "ratio": mine / theirs,
            "unit": "images/s",
            "error": error,
        }

    def _compiled(self, method: str) -> Callable[..., np.ndarray]:
        call = jax.jit(lambda params, x: getattr(nnx.merge(self.graphdef, params), method)(x))
        return lambda x: np.asarray(call(self.params, x))

    def _encode(self) -> tuple[list[Callable[[], object]], float]:
        torch, images = self.peer.torch, np.asarray(image_ops.to_float(self.pixels))
        with torch.no_grad():
            theirs = self.peer.embed(self.images).permute(0, 2, 3, 1).numpy()
        error = _difference(self._compiled("embed")(images), theirs)

        def peer() -> Any:
            with torch.no_grad():
                return self.peer.quantize(self.peer.embed(self.images))

        encode = self._compiled("encode")
        return [functools.partial(encode, images), peer], error

    def _decode(self) -> tuple[list[Callable[[], object]], float]:
        torch, model = self.peer.torch, self.config.model
        codes = np.random.default_rng(1).integers(
            model.codebook_size, size=(self.config.batch_size, model.num_codes)
        )

        def peer() -> Any:
            with torch.no_grad():
                images = self.peer.render(self.peer.averages(torch.from_numpy(codes))[-1])
                return images.clamp(0, 1)

        decode = functools.partial(self._compiled("decode"), codes.astype(np.int32))
        return [decode, peer], _difference(decode(), peer().permute(0, 2, 3, 1).numpy())

    def _train(self) -> tuple[list[Callable[[], object]], float]:
        """The error is that of the losses of the first two steps; the second follows from all gradients."""
        mesh, optimizer = sharding.make_mesh(), optax.adam(LEARNING_RATE)
        step_fn = train_step.make_train_step(self.graphdef, objective.loss_fn, optimizer, seed=0)
        state = train_state.init_state(jax.tree.map(jax.numpy.copy, self.params), optimizer, mesh)
        batch = sharding.put_batch({"images": self.pixels}, mesh)

        def step() -> float:
            nonlocal state
            with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
                state, sums = step_fn(state, batch)
            total, weight = jax.device_get(jax.block_until_ready((sums, state))[0]["loss"])
            return float(total / weight)

        peer = functools.partial(self.peer.make_train_step(LEARNING_RATE), self.images)
        mine, theirs = (np.array([call() for _ in range(2)]) for call in (step, peer))
        return [step, peer], _difference(mine, theirs)


def _init(model: SPAEConfig) -> tuple[nnx.GraphDef, Params]:
    make = lambda: autoencoder.SPAE(model, rngs=nnx.Rngs(params=0))
    graphdef, _ = param_trees.describe(make, None)
    return graphdef, jax.jit(lambda: nnx.to_pure_dict(nnx.split(make(), nnx.Param)[1]))()


def _quantizer_share(config: TokenizerBenchConfig) -> dict[str, Any]:
    model = dataclasses.replace(
        config.model, embed_dim=config.word_dim, codebook_size=config.num_words
    )
    graphdef, params = _init(model)
    grids = model.grids_at(model.image_size, model.image_size)
    shape = (config.batch_size, model.image_size, model.image_size, 3)
    images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    embed = jax.jit(lambda params, x: nnx.merge(graphdef, params).embed(x))
    search = jax.jit(lambda params, z: quantize.quantize(z, params["codebook"], grids))
    z = embed(params, images)
    calls = [
        lambda: jax.block_until_ready(search(params, z)),
        lambda: jax.block_until_ready(embed(params, images)),
    ]
    mine, encoder = timing.alternate(calls, config.num_rounds, is_warm=True)
    memory = search.lower(params, z).compile().memory_analysis().temp_size_in_bytes
    return {
        "ours": mine,
        "peer": encoder,
        "ratio": mine / encoder,
        "unit": "s",
        "memory": memory,
    }


def _difference(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def check(name: str, error: float) -> float:
    """The difference of the two sides' results; raises UserError if it is above `TOLERANCE`."""
    if not error <= TOLERANCE:
        raise UserError(
            f"{name}: the results of the two sides differ by {error:.1e}, more than {TOLERANCE:.0e}; they "
            "are not the same work."
        )
    return error
