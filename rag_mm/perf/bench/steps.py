"""Our training step and our decoding beside transformers: one shape, one process, rounds by turns."""

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

    def model(self, width: int) -> ra_cm3.RACM3Config:
        """LLaMA's family in float32: heads of 32, a gated MLP of 8/3 the width."""
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
        """The batch of every training step."""
        shape = (self.batch_size, self.length)
        return ours.make_rows(np.random.default_rng(0), shape, self.vocab_size)


def train(config: StepBenchConfig, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """Tokens a second of a step of Adam, prepared batch to new parameters; a case a width and peer."""
    with timing.on_threads(config.num_threads):
        cases = _train(config, say)
    return ours.with_machine(cases, config.num_threads, torch_peer.versions())


def decode(config: StepBenchConfig, say: Say = lambda line: None) -> dict[str, Mapping[str, Any]]:
    """New tokens a second, greedy, prefill included; a case a batch size.

    `two_streams` is what a second row costs at batch 1, as guidance by a second stream would: seconds of
    two over seconds of one.
    """
    with timing.on_threads(config.num_threads):
        cases = _decode(config, say)
    return ours.with_machine(cases, config.num_threads, torch_peer.versions())


def _train(config: StepBenchConfig, say: Say) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    rows = config.rows()
    ids = rows["tokens"]
    for width in config.widths:
        say(f"training, {width} wide")
        model = config.model(width)
        kinds = {"eager": False} | ({"compiled": True} if config.with_compiled else {})
        calls = [functools.partial(ours.make_train_step(model, optax.adam(LEARNING_RATE)), rows)]
        for is_compiled in kinds.values():
            peer = torch_peer.make_train_step(
                model.decoder, LEARNING_RATE, config.num_threads, is_compiled
            )
            calls.append(functools.partial(peer, ids))
        losses = [call() for call in calls]
        rates = [
            ids.size / each for each in timing.alternate(calls, config.num_rounds, is_warm=True)
        ]
        for kind, rate, loss in zip(kinds, rates[1:], losses[1:], strict=True):
            cases[f"{width}_{kind}"] = {
                **_ratio(rates[0], rate, "tokens/s"),
                "our_loss": losses[0],
                "peer_loss": loss,
            }
    return cases


def _decode(config: StepBenchConfig, say: Say) -> dict[str, dict[str, Any]]:
    decoder = config.model(config.widths[0]).decoder
    mine, theirs = (
        ours.make_generate(decoder),
        torch_peer.make_generate(decoder, config.num_threads),
    )
    rng, count, cases = np.random.default_rng(0), config.num_new, {}

    def prompts(batch_size: int) -> np.ndarray:
        shape = (batch_size, config.length - count)
        return rng.integers(1, config.vocab_size, shape).astype(np.int32)

    for batch_size in config.batch_sizes:
        say(f"decoding {batch_size} rows")
        given = prompts(batch_size)
        calls = [functools.partial(generate, given, count) for generate in (mine, theirs)]
        seconds = timing.alternate(calls, config.num_rounds, is_warm=True)
        rates = [batch_size * count / each for each in seconds]
        cases[f"batch_{batch_size}"] = _ratio(rates[0], rates[1], "tokens/s")
    calls = [functools.partial(mine, prompts(rows), count) for rows in (2, 1)]
    two, one = timing.alternate(calls, 2 * config.num_rounds, is_warm=True)
    cases["two_streams"] = _ratio(two, one, "s")
    return cases


def _ratio(ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit}
