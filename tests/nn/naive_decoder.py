"""A reference decoder in float64 NumPy, without scan, mask or batch."""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx

from rag_mm.nn import decoder, param_trees

_erf = np.vectorize(math.erf)


def make_model(config):
    return decoder.Decoder(config, rngs=nnx.Rngs(params=0))


def random_params(config, seed=0):
    """Structure, and random parameters: scales differ from one and biases from zero."""
    graphdef, abstract = param_trees.describe(lambda: make_model(config), None)
    rng = np.random.default_rng(seed)

    def sample(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3, leaf.shape).astype(np.float32)

    return graphdef, jax.tree_util.tree_map_with_path(sample, abstract)


def forward(config, tree, tokens, positions, segment_ids, contexts=None):
    """Logits [B, T, V] of int arrays [B, T]; `contexts` has vectors [M, C] for each sequence."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    contexts = [None] * len(tokens) if contexts is None else contexts
    sequences = zip(tokens, positions, segment_ids, contexts, strict=True)
    return np.stack([_forward(config, tree, *sequence) for sequence in sequences])


def _forward(config, tree, tokens, positions, segment_ids, context):
    x = tree["embedding"]["table"][tokens]
    if config.scale_embeddings:
        x = x * math.sqrt(config.embed_dim)
    if config.positions == "learned":
        x = x + tree["position_embedding"]["table"][positions]
    if config.positions == "sinusoidal":
        half = config.embed_dim // 2
        angles = positions[:, None] / 10_000 ** (np.arange(half) / (half - 1))
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], tree["stack"]["blocks"])
        x = apply_block(config, block, x, positions, segment_ids, context)
    head = tree["embedding" if config.tie_embeddings else "head"]["table"]
    return norm(config, tree.get("norm"), x) @ head.T


def apply_block(config, block, x, positions, segment_ids, context=None):
    """x: [T, D] -> [T, D]."""
    x = x + _attention(
        config,
        block["attention"],
        norm(config, block.get("attention_norm"), x),
        positions,
        segment_ids,
    )
    if context is not None:
        read = norm(config, block.get("cross_norm"), x)
        x = x + _cross_attention(config, block["cross_attention"], read, context)
    return x + _mlp(config, block["mlp"], norm(config, block.get("mlp_norm"), x))


def norm(config, weights, x):
    if config.norm != "rmsnorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    weights = weights or {}
    return x * weights.get("scale", 1.0) + weights.get("bias", 0.0)


def _linear(weights, x, num_out):
    """x: [T, *in] -> [T, *out], the last `num_out` axes of the kernel being out."""
    kernel = weights["kernel"]
    flat = kernel.reshape(-1, math.prod(kernel.shape[kernel.ndim - num_out :]))
    y = x.reshape(len(x), len(flat)) @ flat
    return y.reshape(len(x), *kernel.shape[kernel.ndim - num_out :]) + weights.get("bias", 0.0)


def _attention(config, weights, x, positions, segment_ids):
    q, k, v = (_linear(weights[name], x, 2) for name in "qkv")
    if config.qk_norm:
        rms = dataclasses.replace(config, norm="rmsnorm")
        q, k = norm(rms, weights["q_norm"], q), norm(rms, weights["k_norm"], k)
    if config.smear_lags:
        q = _smear(config, q, segment_ids, weights["q_smear"], ahead=1)
        k = _smear(config, k, segment_ids, weights["k_smear"], ahead=0)
    if config.positions == "rope":
        q, k = _rotate(config, q, positions), _rotate(config, k, positions)
    visible = [[s for s in range(t + 1) if segment_ids[s] == segment_ids[t]] for t in range(len(x))]
    return _linear(weights["out"], _attend(q, k, v, visible), 1)


def _cross_attention(config, weights, x, context):
    q = _linear(weights["q"], x, 2)
    k, v = (_linear(weights[name], context, 2) for name in "kv")
    if config.qk_norm:
        rms = dataclasses.replace(config, norm="rmsnorm")
        q, k = norm(rms, weights["q_norm"], q), norm(rms, weights["k_norm"], k)
    everything = [list(range(len(context)))] * len(x)
    return _linear(weights["out"], _attend(q, k, v, everything), 1)


def _attend(q, k, v, visible):
    """visible: for each query, the keys that it sees; zeros if there are none."""
    attended = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t, n in np.ndindex(q.shape[:2]):
        if visible[t]:
            scores = k[visible[t], n // group] @ q[t, n] / math.sqrt(q.shape[2])
            probs = np.exp(scores - scores.max())
            attended[t, n] = probs / probs.sum() @ v[visible[t], n // group]
    return attended


def _smear(config, x, segment_ids, logit_share, ahead):
    share, (num_tokens, num_heads, head_dim) = 1 / (1 + np.exp(-logit_share)), x.shape
    smeared = x * (1 - share[:, None])
    for t, n, d in np.ndindex(num_tokens, num_heads, head_dim):
        lags = config.smear_lags[n * len(config.smear_lags) // num_heads] or (0,)
        lag = max(lags[d % (head_dim // 2) % len(lags)] - ahead, 0)
        if t >= lag and segment_ids[t] == segment_ids[t - lag]:
            smeared[t, n, d] += share[n] * x[t - lag, n, d]
    return smeared


def _rotate(config, x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None, None] / config.rope_theta ** (np.arange(half) / half)
    rotated = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([rotated.real, rotated.imag], -1)


def _mlp(config, weights, x):
    up = _linear(weights["up"], x, 1)
    if config.mlp == "swiglu":
        gate = _linear(weights["gate"], x, 1)
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = {
            "relu": lambda x: np.maximum(x, 0),
            "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
            "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
        }[config.mlp](up)
    return _linear(weights["down"], hidden, 1)
