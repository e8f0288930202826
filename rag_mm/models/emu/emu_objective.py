"""Emu's one objective: cross-entropy where the next element is text, regression where it is a vector.

Let h_t be the hidden state at position t and x_t the input there (a token's embedding, or an image's vector):

    text    mean of -log p(id_{t+1} | h_t), where id_{t+1} is none of [PAD], [IMG], <image> and [/IMG]
    image   mean of |W h_t - stop_gradient(x_{t+1})|^2 over dimensions and over the N + 1 pairs of each image,
            whose targets are its N vectors and the embedding of [/IMG]
    loss    text + image_loss_weight * image + anchor_weight * anchor

No pair of [/IMG] exists for targets of kind pca: their space does not have that embedding. Of a step in
parts, each part is standardised by its own statistics, and all count alike.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from rag_mm.core import sharding
from rag_mm.core.roles import MAIN, RETRIEVED
from rag_mm.models.emu import image_codes
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.emu_model import Emu, take
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.ops import losses


def loss_fn(model: Emu, batch: Batch, rng: Key[Array, ""]) -> tuple[Float32[Array, ""], Metrics]:
    """The loss of the module's docstring, with the weights of `model.config`. `rng` is unused.

    Args:
        model: the model.
        batch: int32 [B, T]: `tokens`, `targets` (the next token; pad where a segment ends), `positions`,
            `segment_ids`, and `slot` (`image_slots`; -1 where no image is). float [B, I, M, C]
            `image_tokens` of up to I images a row; or, for a model with a tower, `images` uint8
            [B, I, H, W, 3]. Images that no slot names are filling. int8 [B, T] `roles` of targets, if they
            are to be weighted: retrieved ones by `retrieved_weight`, others than main ones by 0.
        rng: unused.

    Returns:
        The loss, and sums with weights: loss, text_ce (nats), image_mse, image_r2 (share of the variance of
        the codes at slots that the predictions explain), image_variance and participation_ratio of the
        codes (`image_codes.spread`), and anchor_mse if there is an anchor.
    """
    del rng
    c = model.config
    slot, targets = jnp.asarray(batch["slot"]), jnp.asarray(batch["targets"])
    codes, anchor, is_counted = _encode(model, batch, slot)
    inputs = model.mix(batch["tokens"], slot, _rows(model.to_vectors(codes), slot.shape[0]))
    hidden = model.decoder(inputs, batch["positions"], batch.get("segment_ids"))
    weights = _weights(batch, c)
    nll = losses.chunked_token_nll(model.decoder.logits, hidden, targets, c.loss_chunks)
    text, text_weight = _weighted(nll, jnp.where(text_targets(targets, c), weights, 0))
    is_slot, is_end = image_pairs(slot, targets, c)
    errors = _image_errors(model, hidden, codes, slot, targets, is_end)
    image, image_weight = _weighted(errors, jnp.where(is_slot | is_end, weights, 0))
    at_slots, slot_weight = _weighted(errors, jnp.where(is_slot, weights, 0))
    loss = text / jnp.maximum(text_weight, 1)
    loss += c.image_loss_weight * image / jnp.maximum(image_weight, 1)
    variance, ratio = image_codes.spread(jax.lax.stop_gradient(codes), is_counted)
    one = jnp.float32(1)
    metrics: Metrics = {
        "text_ce": (text, text_weight),
        "image_mse": (image, image_weight),
        "image_r2": (slot_weight - at_slots / jnp.maximum(variance, 1e-12), slot_weight),
        "image_variance": (variance, one),
        "participation_ratio": (ratio, one),
    }
    if anchor is not None:
        loss += c.targets.anchor_weight * anchor
        metrics["anchor_mse"] = (anchor, one)
    return loss, {"loss": (loss, one), **metrics}


def answer_loss(
    model: Emu, batch: Batch, rng: Key[Array, ""]
) -> tuple[Float32[Array, ""], Metrics]:
    """Cross-entropy of answers alone, for instruction tuning, which changes nothing before the decoder.

    Args:
        model: the model.
        batch: as of `loss_fn`, but in place of tokens or pixels the images' `vectors`, float [B, I, N, D], as
            `Emu.to_vectors` makes them; text whose role is main counts.
        rng: unused.

    Returns:
        The loss in nats, and its sum with its weight.
    """
    del rng
    slot, targets = jnp.asarray(batch["slot"]), jnp.asarray(batch["targets"])
    vectors = _flat(jnp.asarray(batch["vectors"])).astype(model.config.decoder.dtype)
    inputs = model.mix(batch["tokens"], slot, _rows(vectors, slot.shape[0]))
    hidden = model.decoder(inputs, batch["positions"], batch["segment_ids"])
    chunks = model.config.loss_chunks
    nll = losses.chunked_token_nll(model.decoder.logits, hidden, targets, chunks)
    counts = text_targets(targets, model.config) & (jnp.asarray(batch["roles"]) == MAIN)
    total, weight = _weighted(nll, counts.astype(jnp.float32))
    return total / jnp.maximum(weight, 1), {"loss": (total, weight)}


def _image_errors(
    model: Emu,
    hidden: Float[Array, "B T D"],
    codes: Float[Array, "BI N R"],
    slot: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    is_end: Bool[Array, "B T"],
) -> Float32[Array, "B T"]:
    """Mean squared error over dimensions of what is predicted of the next slot, or of `[/IMG]`."""
    aims = take(_rows(codes, slot.shape[0]), _next(slot)).astype(jnp.float32)
    if model.up is None:
        ends = jnp.full_like(targets[:, :1], model.config.ids.end_image)
        end_vectors = model.decoder.input_vectors(ends).astype(jnp.float32)
        aims = jnp.where(is_end[:, :, None], end_vectors, aims)
    predicted = model.regress(hidden).astype(jnp.float32)
    return jnp.square(predicted - jax.lax.stop_gradient(aims)).mean(-1)


def text_targets(targets: Int[Array, "B T"], config: EmuConfig) -> Bool[Array, "B T"]:
    """Where the cross-entropy counts: the target is none of `[PAD]`, `[IMG]`, `<image>` and `[/IMG]`."""
    ids = config.ids
    left_out = jnp.array([ids.pad, ids.image, ids.slot, ids.end_image], jnp.int32)
    return (targets[:, :, None] != left_out[None, None]).all(-1)


def image_pairs(
    slot: Int[Array, "B T"], targets: Int[Array, "B T"], config: EmuConfig
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Positions from which a slot's code, and from which `[/IMG]`'s embedding, is predicted."""
    is_last = (slot >= 0) & (targets == config.ids.end_image)
    has_end = config.targets.kind != "pca"
    return _next(slot) >= 0, is_last if has_end else jnp.zeros_like(is_last)


def _next(slot: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.pad(slot[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def _encode(
    model: Emu, batch: Batch, slot: Int[Array, "B T"]
) -> tuple[Float[Array, "BI N R"], Float32[Array, ""] | None, Bool[Array, " BI"]]:
    """Codes of all images of the batch, the anchor's error, and which images some slot names."""
    c = model.config
    name = "images" if model.tower is not None else "image_tokens"
    given = jnp.asarray(batch[name])
    flat = _flat(given)
    if name == "images":
        flat = model.see(flat.astype(jnp.float32) / 255)
    firsts = jnp.arange(given.shape[1], dtype=jnp.int32) * c.num_slots
    is_counted = _flat((slot[:, :, None] == firsts[None, None]).any(1))
    codes = model.encode(flat, is_counted)
    if model.anchor is None:
        return codes, None, is_counted
    read = model.anchor(codes[:, None]).astype(jnp.float32)[:, 0]
    aims = jax.lax.stop_gradient(model.normal(flat.astype(read.dtype)))
    errors = jnp.square(read - aims).mean((1, 2))
    total, count = _weighted(errors, is_counted.astype(jnp.float32))
    return codes, total / jnp.maximum(count, 1), is_counted


def _weights(batch: Batch, config: EmuConfig) -> Float32[Array, "..."]:
    if "roles" not in batch:
        return jnp.float32(1)
    roles = jnp.asarray(batch["roles"])
    retrieved = jnp.where(roles == RETRIEVED, jnp.float32(config.retrieved_weight), 0)
    return jnp.where(roles == MAIN, jnp.float32(1), retrieved)


def _weighted(
    values: Float32[Array, "..."], weights: Float32[Array, "..."]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    return (values * weights).sum(), weights.sum()


def _flat(x: jax.Array) -> jax.Array:
    """[B, I, ...] as [B * I, ...], split over devices by rows."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    spec = sharding.activation_spec("batch", *(None,) * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=spec)


def _rows(x: Float[Array, "BI N R"], num_rows: int) -> Float[Array, "B J R"]:
    """Codes of images as codes of rows, J = I * N."""
    shape = (num_rows, x.shape[0] // num_rows * x.shape[1], x.shape[2])
    return jax.lax.reshape(x, shape, out_sharding=sharding.activation_spec("batch", None, None))
