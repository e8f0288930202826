"""One device against its published peaks: MFU of a training step, bandwidth of greedy decoding at batch 1.

The models are CM3Leon's decoder at the paper's 7 B and at 1.3 B in between, bfloat16 over float32 parameters.
Nothing beyond jax, flax, optax and orbax is imported.

What fits an H200 (141 GB): a parameter, Adam's two moments and its gradient are 16 bytes in float32, so
7 B take 108 GB and leave some 20 GB to the layers. Four rows with full remat keep 4 GB of inputs, beside
them what one layer and one run of logits need; `dots` keeps 12 GB a row. So no moment is narrowed or
factored. 1.3 B take 22 GB, and `dots` 4.4 GB a row. This is reckoned; `peak_bytes` of a result is what the
device saw.
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
    """A model, and the rows and remat of a training step that leave room on an H200."""

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
    """Model FLOPs a second (`perf.flops`) of the house's training step beside the peak: `ratio` is the MFU.

    Rows are as long as the model's longest and one segment each, so that cuDNN runs without a mask. Peak and
    ratio are None where `size` is tiny and the device has no published peak.

    Args:
        size: one of SIZES.
        batch_size: rows; None takes the size's.
        remat: none, dots or full; None takes the size's.
        loss_chunks: runs of positions whose logits are made one after the other.
        num_steps: that are timed together.
        num_rounds: of which the median counts.
        say: is told what begins.

    Returns:
        One case named after the size. `ours` and `peer` are FLOP/s; beside them stand `tokens_per_second`,
        `step_seconds`, `loss` (nats), `attention` (the kernel), the settings, and `peak_bytes` of the
        device where it counts them.

    Raises:
        UserError: no published peak, or the step does not fit the device.
    """
    device = _device(size)
    batch_size = SIZES[size].batch_size if batch_size is None else batch_size
    given = SIZES[size].model
    decoder = dataclasses.replace(given.decoder, remat=remat or SIZES[size].remat)
    model = dataclasses.replace(given, decoder=decoder, loss_chunks=loss_chunks)
    length = decoder.max_seq_len
    say(f"training {size}: {batch_size} rows of {length} tokens, remat {decoder.remat}")
    rows = ours.make_rows(np.random.default_rng(0), (batch_size, length), decoder.vocab_size)
    del rows["segment_ids"]
    with _must_fit(device, "fewer --batch rows or --remat=full"):
        step = ours.make_train_step(model, optimizer.make_optimizer(_ADAM, _SCHEDULED_STEPS))
        loss = step(rows)
        [seconds] = timing.alternate([functools.partial(step, rows, num_steps)], num_rounds)
    rate = batch_size * length * num_steps / seconds
    case = {
        **_beside(rate * flops.train_flops(decoder, length), chips.DEVICE_FLOPS, device, "FLOP/s"),
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
    """Bytes a second that greedy decoding of one row must read beside the bandwidth: `ratio` is its share.

    A token must read the weights that multiply it and the keys and values before it, all in bfloat16
    (`traffic.decode_bytes`). The time is that of the whole call, prefill included. Peak and ratio as in
    `train`.

    Args:
        size: one of SIZES.
        length: tokens of the row at its end; None is a quarter of the model's longest.
        num_new: of which so many are decoded, the rest is the prompt; None is a half.
        num_rounds: of which the median counts.
        say: is told what begins.

    Returns:
        One case named after the size. `ours` and `peer` are B/s; beside them stand `tokens_per_second`,
        `bytes_per_token`, the settings, and `peak_bytes` of the device where it counts them.

    Raises:
        UserError: no published peak, no room for prompt and new tokens, or no room on the device.
    """
    device = _device(size)
    decoder = SIZES[size].model.decoder
    length = decoder.max_seq_len // 4 if length is None else length
    num_new = length // 2 if num_new is None else num_new
    if not 1 <= num_new < length <= decoder.max_seq_len:
        raise UserError(
            f"--new={num_new} and --length={length} do not fit: a row of {size} holds at most "
            f"{decoder.max_seq_len} tokens, and --new leaves room for a prompt in --length."
        )
    say(f"decoding {size}: {num_new} tokens behind {length - num_new}")
    shape = (1, length - num_new)
    prompts = np.random.default_rng(0).integers(1, decoder.vocab_size, shape).astype(np.int32)
    with _must_fit(device, "a smaller --length"):
        generate = ours.make_generate(decoder, weights=decoder.dtype)
        call = functools.partial(generate, prompts, num_new)
        [seconds] = timing.alternate([call], num_rounds)
    per_token = traffic.decode_bytes(decoder, length - num_new / 2)
    rate = num_new / seconds
    case = {
        **_beside(rate * per_token, chips.DEVICE_BANDWIDTH, device, "B/s"),
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
            f"There is no published peak of {device.device_kind!r} here to measure {size} against (there "
            f"are {', '.join(chips.DEVICE_FLOPS)}); --size=tiny runs anywhere, without one."
        )
    return device


def _beside(
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
        raise UserError(f"It does not fit {device.device_kind}; give {remedy}.") from error


def _kernel(decoder: DecoderConfig, device: jax.Device) -> str:
    block, dtype = decoder.block, jnp.dtype(decoder.dtype)
    heads = jax.ShapeDtypeStruct((1, decoder.max_seq_len, block.num_heads, block.head_dim), dtype)
    return attention.choose(device.platform, heads, heads, is_self=True)


def _peak_bytes(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
