"""Our training step and decoding compared with transformers: same shapes and process, interleaved rounds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from rag_mm.models import ra_cm3
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.perf.bench import ours, timing, torch_peer

LEARNING_RATE = 2e-3
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class StepBenchConfig:
    """Configuration of the benchmark; the defaults are the quickstart's decoder when it was first measured.

    Attributes:
        widths: decoder widths, one case each; heads and MLP scale with the width.
        num_layers, vocab_size: of the decoder.
        length: tokens per sequence.
        batch_size: sequences per training step.
        batch_sizes: batch sizes for decoding, one case each.
        num_new: tokens to decode at the end of a sequence; the rest is the prompt.
        num_threads: threads of both sides.
        num_rounds: timing rounds; the median is reported.
        with_compiled: also compare with torch.compile, which needs a C++ compiler.
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

    def model(self, width: int) -> ra_cm3.RACM3Config:
        """A LLaMA-like decoder in float32: heads of dimension 32, a gated MLP of 8/3 the width."""
        decoder = DecoderConfig(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            embed_dim=width,
            num_heads=max(width // 32, 1),
            mlp_dim=width * 8 // 3,
            max_seq_len=self.length,
        )
        return ra_cm3.RACM3Config(decoder, code_offset=self.vocab_size)

    def rows(self) -> dict[str, np.ndarray]:
        """The batch used in every training step."""
        shape = (self.batch_size, self.length)
        return ours.make_rows(np.random.default_rng(0), shape, self.vocab_size)


def train(config: StepBenchConfig, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """Tokens per second of an Adam step, prepared batch to new parameters; one case per width and peer."""
    with timing.on_threads(config.num_threads):
        cases = _train(config, say)
    return ours.with_machine(cases, config.num_threads, torch_peer.versions())


def decode(config: StepBenchConfig, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """New tokens per second of greedy decoding, including prefill; one case per batch size.

    `two_streams` is the cost of a second sequence at batch size 1, as in classifier-free guidance: seconds at
    batch size 2 divided by seconds at batch size 1.
    """
    with timing.on_threads(config.num_threads):
        cases = _decode(config, say)
    return ours.with_machine(cases, config.num_threads, torch_peer.versions())


def _train(config: StepBenchConfig, say: Say) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    rows = config.rows()
    ids = rows["tokens"]
    for width in config.widths:
        say(f"training, width {width}")
        model = config.model(width)
        peers = {"eager": False} | ({"compiled": True} if config.with_compiled else {})
        calls = [functools.partial(ours.make_train_step(model, optax.adam(LEARNING_RATE)), rows)]
        for is_compiled in peers.values():
            peer = torch_peer.make_train_step(
                model.decoder, LEARNING_RATE, config.num_threads, is_compiled
            )
            calls.append(functools.partial(peer, ids))
        losses = [call() for call in calls]
        seconds = timing.alternate(calls, config.num_rounds, is_warm=True)
        rates = [ids.size / step_seconds for step_seconds in seconds]
        for name, rate, loss in zip(peers, rates[1:], losses[1:], strict=True):
            cases[f"{width}_{name}"] = {
                **_ratio(rates[0], rate, "tokens/s"),
                "our_loss": losses[0],
                "peer_loss": loss,
            }
    return cases


def _decode(config: StepBenchConfig, say: Say) -> dict[str, dict[str, Any]]:
    decoder = config.model(config.widths[0]).decoder
    generate_ours = ours.make_generate(decoder)
    generate_peer = torch_peer.make_generate(decoder, config.num_threads)
    rng, count, cases = np.random.default_rng(0), config.num_new, {}

    def prompts(batch_size: int) -> np.ndarray:
        shape = (batch_size, config.length - count)
        return rng.integers(1, config.vocab_size, shape).astype(np.int32)

    for batch_size in config.batch_sizes:
        say(f"decoding, batch size {batch_size}")
        batch = prompts(batch_size)
        calls = [
            functools.partial(generate, batch, count) for generate in (generate_ours, generate_peer)
        ]
        seconds = timing.alternate(calls, config.num_rounds, is_warm=True)
        rates = [batch_size * count / call_seconds for call_seconds in seconds]
        cases[f"batch_{batch_size}"] = _ratio(rates[0], rates[1], "tokens/s")
    calls = [functools.partial(generate_ours, prompts(size), count) for size in (2, 1)]
    two, one = timing.alternate(calls, 2 * config.num_rounds, is_warm=True)
    cases["two_streams"] = _ratio(two, one, "s")
    return cases


def _ratio(ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit}
