"""One device compared with its published peaks: training MFU, bandwidth of greedy decoding at batch size 1.

The models are CM3Leon's decoder with 7B (the paper's) and 1.3B parameters, bfloat16 compute over float32
parameters. Nothing beyond jax, flax, optax, orbax and their dependencies is imported.

Memory on an H200 (141 GB): a parameter, its gradient and Adam's two moments take 16 bytes in float32, so 7B
parameters take 108 GB and leave about 20 GB for activations. Four sequences with full remat keep 4 GB of
layer inputs, plus the working memory of one layer and one chunk of logits; `dots` keeps 12 GB per sequence.
No moment is therefore stored in lower precision or factored. 1.3B parameters take 22 GB, and `dots` 4.4 GB
per sequence. These are estimates; `peak_bytes` of a result is measured.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.models import cm3leon
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.ops import attention
from rag_mm.perf import chips, flops
from rag_mm.perf.bench import ours, timing
from rag_mm.perf.plan import traffic
from rag_mm.train import optimizer

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, with the batch size and remat of a training step that fit an H200."""

    model: cm3leon.CM3LeonConfig
    batch_size: int
    remat: str


_TINY: dict[str, Any] = dict(vocab_size=512, max_seq_len=128, code_offset=384)
SIZES = {
    "tiny": Size(cm3leon.make_config(2, 64, 4, **_TINY), 2, "none"),
    "1.3b": Size(cm3leon.make_config(24, 2048, 16), 8, "dots"),
    "7b": Size(cm3leon.CM3LeonConfig.b7(), 4, "full"),
}
_ADAM = optimizer.OptimizerConfig(learning_rate=1.2e-4, b2=0.95, weight_decay=0.1)  # CM3Leon's, 7 B
_SCHEDULED_STEPS = 300_000


def train(
    size: str,
    batch_size: int | None = None,
    remat: str | None = None,
    loss_chunks: int = 8,
    num_steps: int = 10,
    num_rounds: int = 5,
    say: Say = lambda line: None,
) -> dict[str, Mapping[str, Any]]:
    """Model FLOP/s (`perf.flops`) of our training step compared with the peak; `ratio` is the MFU.

    Sequences have the model's maximal length and one segment each, so that cuDNN runs without a mask. Peak
    and ratio are None if `size` is tiny and the device has no published peak.

    Args:
        size: one of SIZES.
        batch_size: sequences per step; None means the size's.
        remat: none, dots or full; None means the size's.
        loss_chunks: chunks of positions whose logits are computed one after the other.
        num_steps: steps timed together.
        num_rounds: timing rounds; the median is reported.
        say: called with a progress message.

    Returns:
        One case named after the size. `ours` and `peer` are FLOP/s, `counted` says which, and the others are
        `tokens_per_second`,
        `step_seconds`, `loss` (nats), `attention` (the kernel), the settings, and `peak_bytes` of the device
        if it reports them.

    Raises:
        UserError: no published peak, or the step does not fit the device.
    """
    device = _device(size)
    batch_size = SIZES[size].batch_size if batch_size is None else batch_size
    base = SIZES[size].model
    decoder = dataclasses.replace(base.decoder, remat=remat or SIZES[size].remat)
    model = dataclasses.replace(base, decoder=decoder, loss_chunks=loss_chunks)
    length = decoder.max_seq_len
    say(f"training {size}: {batch_size} sequences of {length} tokens, remat {decoder.remat}")
    rows = ours.make_rows(np.random.default_rng(0), (batch_size, length), decoder.vocab_size)
    del rows["segment_ids"]
    with _must_fit(device, "a smaller --batch or --remat=full"):
        step = ours.make_train_step(model, optimizer.make_optimizer(_ADAM, _SCHEDULED_STEPS))
        loss = step(rows)
        [seconds] = timing.alternate([functools.partial(step, rows, num_steps)], num_rounds)
    rate = batch_size * length * num_steps / seconds
    case = {
        **_ratio(rate * flops.train_flops(decoder, length), chips.DEVICE_FLOPS, device, "FLOP/s"),
        "counted": flops.CONVENTION,
        "tokens_per_second": rate,
        "step_seconds": seconds / num_steps,
        "loss": loss,
        "batch_size": batch_size,
        "length": length,
        "remat": decoder.remat,
        "loss_chunks": loss_chunks,
        "attention": _kernel(decoder, device),
        "peak_bytes": _peak_bytes(device),
    }
    return ours.with_machine({size: case})


def decode(
    size: str,
    length: int | None = None,
    num_new: int | None = None,
    num_rounds: int = 5,
    say: Say = lambda line: None,
) -> dict[str, Mapping[str, Any]]:
    """Bytes per second that greedy decoding at batch size 1 must read, compared with the memory bandwidth.

    Each token reads the weights that multiply it and all previous keys and values, in bfloat16
    (`traffic.decode_bytes`). The time is that of the whole call, including prefill. `ratio` is the fraction
    of the bandwidth; peak and ratio may be None as in `train`.

    Args:
        size: one of SIZES.
        length: final sequence length in tokens; None means a quarter of the model's maximum.
        num_new: tokens to decode, the rest is the prompt; None means half.
        num_rounds: timing rounds; the median is reported.
        say: called with a progress message.

    Returns:
        One case named after the size. `ours` and `peer` are B/s; the others are `tokens_per_second`,
        `bytes_per_token`, the settings, and `peak_bytes` of the device if it reports them.

    Raises:
        UserError: no published peak, no space for a prompt, or the model does not fit the device.
    """
    device = _device(size)
    decoder = SIZES[size].model.decoder
    length = decoder.max_seq_len // 4 if length is None else length
    num_new = length // 2 if num_new is None else num_new
    if not 1 <= num_new < length <= decoder.max_seq_len:
        raise UserError(
            f"--new={num_new} and --length={length} are invalid: {size} supports at most "
            f"{decoder.max_seq_len} tokens, and --new must be less than --length to leave a prompt."
        )
    say(f"decoding {size}: {num_new} tokens after a prompt of {length - num_new}")
    shape = (1, length - num_new)
    prompts = np.random.default_rng(0).integers(1, decoder.vocab_size, shape).astype(np.int32)
    with _must_fit(device, "a smaller --length"):
        generate = ours.make_generate(decoder, weights=decoder.dtype)
        call = functools.partial(generate, prompts, num_new)
        [seconds] = timing.alternate([call], num_rounds)
    per_token = traffic.decode_bytes(decoder, length - num_new / 2)
    rate = num_new / seconds
    case = {
        **_ratio(rate * per_token, chips.DEVICE_BANDWIDTH, device, "B/s"),
        "tokens_per_second": rate,
        "bytes_per_token": per_token,
        "length": length,
        "num_new": num_new,
        "peak_bytes": _peak_bytes(device),
    }
    return ours.with_machine({size: case})


def _device(size: str) -> jax.Device:
    device = jax.devices()[0]
    if size != "tiny" and device.device_kind not in chips.DEVICE_FLOPS:
        raise UserError(
            f"{size} needs a device with a published peak, and {device.device_kind!r} has no published peak "
            f"here (known: {', '.join(chips.DEVICE_FLOPS)}); --size=tiny runs on any device."
        )
    return device


def _ratio(
    rate: float, peaks: Mapping[str, float], device: jax.Device, unit: str
) -> dict[str, Any]:
    peak = peaks.get(device.device_kind)
    ratio = None if peak is None else rate / peak
    return {"ours": rate, "peer": peak, "ratio": ratio, "unit": unit}


@contextlib.contextmanager
def _must_fit(device: jax.Device, remedy: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"Out of memory on {device.device_kind}; use {remedy}.") from error


def _kernel(decoder: DecoderConfig, device: jax.Device) -> str:
    block, dtype = decoder.block, jnp.dtype(decoder.dtype)
    heads = jax.ShapeDtypeStruct((1, decoder.max_seq_len, block.num_heads, block.head_dim), dtype)
    return attention.choose(device.platform, heads, heads, is_self=True)


def _peak_bytes(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
