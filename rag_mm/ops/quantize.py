"""Vector quantisation by streaming averages over a pyramid of grids (SPAE, spec sections 3 and 5).

A pyramid is the tuple `levels` of the sides of its square grids, coarse to fine, such as
(1, 2, 4, 8, 16, 16); the last is the full grid, and (8,) alone is plain vector quantisation. Codes
are laid out level by level, in raster order inside a level.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.core.errors import UserError

Levels = tuple[int, ...]


def check_levels(levels: Sequence[int]) -> None:
    """Raises UserError unless every grid evenly dilates into the last one."""
    if not levels or any(side < 1 or levels[-1] % side for side in levels):
        raise UserError(
            f"levels={tuple(levels)} is not a pyramid: name at least one grid side, each of them a "
            "divisor of the last."
        )


def num_codes(levels: Levels) -> int:
    """How many codes stand for one image."""
    return sum(side * side for side in levels)


def level_rows(side: int, full: int) -> slice:
    """Rows (and, on square grids, columns) of the full grid that a level of `side` quantises.

    This is P(l) of section 3 counted from zero: h' * i - ceil(h' / 2) for i = 1..side.
    """
    stride = full // side
    return slice(stride // 2, None, stride)


def word_counts(levels: Levels) -> np.ndarray:
    """int32 [levels, side, side]: how many codes each position owns after each level."""
    full = levels[-1]
    counts = np.zeros((len(levels), full, full), np.int32)
    for level, side in enumerate(levels):
        rows = level_rows(side, full)
        counts[level:, rows, rows] += 1
    return counts


def nearest_codes(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """argmin_k ||z - codebook[k]||^2; the lowest k among equals.

    Args:
      z: float32 [..., D].
      codebook: float32 [C, D].

    Returns:
      int32 [...].
    """
    points = z.reshape(-1, z.shape[-1])
    # ||z||^2 is the same for every code. Full precision: rounded products swap near neighbours.
    products = jnp.matmul(points, codebook.T, precision=jax.lax.Precision.HIGHEST)  # [P, C]
    distances = jnp.sum(codebook**2, axis=-1)[None, :] - 2 * products
    # argmin is one scalar loop in XLA on CPU and min is not: find the group of codes by min, and
    # then the code among the few of its group (5 ms instead of 37 for 4,096 points, 1,024 codes).
    size = math.gcd(codebook.shape[0], 32)
    groups = distances.reshape(points.shape[0], -1, size)
    group = jnp.argmin(jnp.min(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    codes = (group * size + jnp.argmin(members, axis=-1)).astype(jnp.int32)
    return codes.reshape(z.shape[:-1])


def quantize(z: jax.Array, codebook: jax.Array, levels: Levels) -> jax.Array:
    """Codes of every level by streaming average quantisation (section 5).

    A position that owns n codes already asks the next one for z_l = (n + 1) z - sum of those n
    vectors, so that their plain average approaches z.

    Args:
      z: float32 [B, S, S, D] with S = levels[-1].
      codebook: float32 [C, D].

    Returns:
      int32 [B, num_codes(levels)]; no gradient passes.
    """
    z, codebook = jax.lax.stop_gradient((z, codebook))
    sums = jnp.zeros_like(z)
    owned = np.zeros(z.shape[1:3], np.float32)
    codes = []
    for side in levels:
        rows = level_rows(side, levels[-1])
        weight = (owned[rows, rows] + 1)[None, :, :, None]
        target = weight * z[:, rows, rows] - sums[:, rows, rows]
        level_codes = nearest_codes(target, codebook)
        sums = sums.at[:, rows, rows].add(codebook[level_codes])
        owned[rows, rows] += 1
        codes.append(level_codes.reshape(z.shape[0], -1))
    return jnp.concatenate(codes, axis=1)


def running_averages(codes: jax.Array, codebook: jax.Array, levels: Levels) -> list[jax.Array]:
    """zhat_<=l for each level present in `codes`: the mean of the vectors a position owns so far.

    Args:
      codes: int32 [B, N], of all levels or of the first few.
      codebook: float32 [C, D]; the result is differentiable in it.

    Returns:
      One float32 [B, S, S, D] per level, zero where a position owns no code yet.

    Raises:
      ValueError: N is not the number of codes of a prefix of `levels`.
    """
    ends = np.cumsum([side * side for side in levels]).tolist()
    if codes.shape[1] not in ends:
        raise ValueError(f"{codes.shape[1]} codes end inside a level; levels end at {ends}")
    full = levels[-1]
    sums = jnp.zeros((codes.shape[0], full, full, codebook.shape[1]), codebook.dtype)
    averages = []
    for side, end, counts in zip(levels, ends, word_counts(levels), strict=True):
        if end > codes.shape[1]:
            break
        grid = codes[:, end - side * side : end].reshape(-1, side, side)
        rows = level_rows(side, full)
        sums = sums.at[:, rows, rows].add(codebook[grid])
        averages.append(sums / np.maximum(counts, 1).astype(np.float32)[None, :, :, None])
    return averages


def straight_through(z: jax.Array, average: jax.Array, levels: Levels) -> jax.Array:
    """Has exactly the value of `average` and passes its gradient on to z unchanged.

    Positions that own no code pass no gradient: there the value does not depend on z at all.
    """
    covered = jnp.asarray(word_counts(levels)[-1] > 0)[None, :, :, None]
    # z - z is exactly zero, whereas z + (average - z) would round.
    passed = jnp.where(covered, z - jax.lax.stop_gradient(z), jnp.zeros_like(z))
    return jax.lax.stop_gradient(average) + passed


def quantization_losses(
    z: jax.Array, averages: Sequence[jax.Array], levels: Levels
) -> tuple[jax.Array, jax.Array]:
    """Codebook and commitment loss of section 7, as float32 scalars.

    Each is a sum over levels of ||z - zhat_<=l||^2, averaged over the positions that own a code by
    then and over D. The codebook loss moves the vectors alone, the commitment loss z alone.
    """
    codebook_loss, commitment_loss = jnp.float32(0), jnp.float32(0)
    for counts, average in zip(word_counts(levels), averages, strict=True):
        covered = (counts > 0).astype(np.float32)
        size = np.float32(covered.sum() * z.shape[0] * z.shape[-1])
        mask = covered[None, :, :, None]
        to_codebook = jnp.sum(mask * (jax.lax.stop_gradient(z) - average) ** 2)
        to_encoder = jnp.sum(mask * (z - jax.lax.stop_gradient(average)) ** 2)
        codebook_loss += to_codebook / size
        commitment_loss += to_encoder / size
    return codebook_loss, commitment_loss


def code_counts(codes: jax.Array, codebook_size: int) -> jax.Array:
    """float32 [codebook_size]: how often each code occurs in `codes` of any shape."""
    return jnp.zeros(codebook_size, jnp.float32).at[codes.reshape(-1)].add(1.0)


def usage(counts: jax.Array) -> jax.Array:
    """The share of codes with a positive count; `counts` may be frequencies."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the code distribution, 1..codebook_size; `counts` may be frequencies."""
    share = counts / jnp.sum(counts)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(share), 0.0)))


def revive_codes(
    codebook: jax.Array, counts: jax.Array, points: jax.Array, key: jax.Array, min_count: float = 1
) -> jax.Array:
    """Moves every code used fewer than `min_count` times onto a badly represented point.

    Points are drawn without repetition with chance proportional to their squared error, as
    k-means++ does, so a revived code lands where it lowers the error most.

    Args:
      codebook: float32 [C, D].
      counts: float32 [C], how often each code was used of late.
      points: float32 [P, D] with P >= C, what is being quantised.

    Returns:
      The new codebook, float32 [C, D]; living codes keep their bits.
    """
    errors = _squared_errors(points, codebook)
    noise = jax.random.gumbel(key, errors.shape)
    _, chosen = jax.lax.top_k(jnp.log(errors) + noise, codebook.shape[0])
    # Dead codes take the best draws in order, whichever rows they stand in.
    is_dead = counts < min_count
    rank = jnp.cumsum(is_dead) - 1
    return jnp.where(is_dead[:, None], points[chosen[rank]], codebook)


def init_kmeans(
    points: jax.Array, num_clusters: int, key: jax.Array, num_steps: int = 12
) -> jax.Array:
    """Lloyd's k-means from k-means++ seeds; deterministic in its key.

    Args:
      points: float32 [P, D] with P >= num_clusters.

    Returns:
      float32 [num_clusters, D] centres.

    Raises:
      ValueError: there are fewer points than clusters.
    """
    if points.shape[0] < num_clusters:
        raise ValueError(f"{points.shape[0]} points cannot seed {num_clusters} clusters")
    pick_key, seed_key, *step_keys = jax.random.split(key, num_steps + 2)
    # Seeds come from a sample: drawing them costs one pass over it per cluster.
    sample = jax.random.permutation(pick_key, points.shape[0])[: 16 * num_clusters]
    seeds = _seed(points[sample], num_clusters, seed_key)
    return _lloyd(points, seeds, jnp.stack(step_keys))


@jax.jit
def _lloyd(points: jax.Array, centers: jax.Array, keys: jax.Array) -> jax.Array:
    def step(centers, key):
        codes = jax.lax.map(lambda p: nearest_codes(p, centers), points, batch_size=4096)
        counts = code_counts(codes, centers.shape[0])
        sums = jnp.zeros_like(centers).at[codes].add(points)
        means = sums / jnp.maximum(counts, 1)[:, None]
        return revive_codes(means, counts, points, key), None

    return jax.lax.scan(step, centers, keys)[0]


@functools.partial(jax.jit, static_argnames="num_clusters")
def _seed(points: jax.Array, num_clusters: int, key: jax.Array) -> jax.Array:
    """k-means++: each next centre is a point drawn by its squared distance to those chosen."""
    first_key, *_ = keys = jax.random.split(key, num_clusters)
    first = points[jax.random.randint(first_key, (), 0, points.shape[0])]

    def draw(errors, key):
        chosen = points[jax.random.categorical(key, jnp.log(errors))]
        return jnp.minimum(errors, jnp.sum((points - chosen[None]) ** 2, axis=-1)), chosen

    errors = jnp.sum((points - first[None]) ** 2, axis=-1)
    _, rest = jax.lax.scan(draw, errors, keys[1:])
    return jnp.concatenate([first[None], rest])


def _squared_errors(points: jax.Array, codebook: jax.Array) -> jax.Array:
    """float32 [P]: squared distance of each point to its nearest code."""

    def error(point):
        return jnp.sum((point - codebook[nearest_codes(point, codebook)]) ** 2)

    return jax.lax.map(error, points, batch_size=4096)
