"""Vector quantization by streaming averages over a pyramid of grids (SPAE, Yu et al. 2023).

A pyramid is the tuple `grids` of (rows, columns) of an image's grids, coarse to fine (`core.code_grids`), one
per level. The last one is the full grid; one grid alone is plain vector quantization. Codes are ordered level
by level, in raster order within a level.

Axis letters: R, S = grids[-1], C codes in the codebook, P points.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from rag_mm.core import code_grids, sharding
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError

_MAX_DISTANCES = 2**25  # Computed at once: 128 MiB in float32.
# On a CPU 4 MiB, which stay in its cache, as long as a chunk is worth its loop.
_CACHED_DISTANCES, _MIN_CHUNK = 2**20, 4096


def check_levels(levels: Sequence[int]) -> None:
    """Raises UserError unless every level's side divides the last one."""
    if not levels or any(side < 1 or levels[-1] % side for side in levels):
        raise UserError(
            f"levels={tuple(levels)} is not a pyramid: give at least one grid side, each a divisor of the "
            "last."
        )


def word_counts(grids: Grids) -> Int32[np.ndarray, "levels R S"]:
    """How many codes each position has after each level."""
    counts = np.zeros((len(grids), *grids[-1]), np.int32)
    for level, grid in enumerate(grids):
        counts[level:, *_places(grid, grids)] += 1
    return counts


def _places(grid: tuple[int, int], grids: Grids) -> tuple[slice, slice]:
    """The rows and the columns of the full grid that a grid quantizes."""
    rows, columns = map(code_grids.patches, grid, grids[-1])
    return rows, columns


def nearest_codes(
    z: Float[Array | np.ndarray, "*shape D"], codebook: Float[Array | np.ndarray, "C D"]
) -> Int32[Array, "*shape"]:
    """argmin_k ||z - codebook[k]||^2; ties go to the lowest k.

    More than 2 ** 25 distances, on a CPU fewer, are computed in chunks of codes, with a running minimum.
    """
    points, norms = z.reshape(-1, z.shape[-1]), jnp.sum(codebook**2, axis=-1)
    num_codes = codebook.shape[0]
    # Chunks of codes, not of positions, as positions may be split over devices. Even the smallest chunk, of
    # 32 codes, has no more distances than z has values if D >= 32.
    num_points = max(1, points.shape[0])
    size = _MAX_DISTANCES // num_points
    if sharding.platform() == "cpu":
        size = min(size, max(_CACHED_DISTANCES // num_points, _MIN_CHUNK))
    size = max(32, size // 32 * 32)
    if size >= num_codes:
        return _nearest(points, codebook, norms)[0].reshape(z.shape[:-1])
    padding = -num_codes % size  # Infinitely far away.
    chunks = (
        jnp.arange(0, num_codes, size, dtype=jnp.int32),
        jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, size, codebook.shape[1]),
        jnp.pad(norms, (0, padding), constant_values=jnp.inf).reshape(-1, size),
    )

    def visit(best, chunk):
        start, *part = chunk
        codes, distances = _nearest(points, *part)
        is_closer = distances < best[1]  # Of equal distances the first stays.
        return (
            jnp.where(is_closer, start + codes, best[0]),
            jnp.where(is_closer, distances, best[1]),
        ), None

    furthest = jnp.full_like(points[:, 0], jnp.inf)
    (codes, _), _ = jax.lax.scan(visit, (jnp.zeros_like(furthest, jnp.int32), furthest), chunks)
    return codes.reshape(z.shape[:-1])


def _nearest(
    points: Float[Array | np.ndarray, "P D"],
    codebook: Float[Array | np.ndarray, "C D"],
    norms: Float[Array, " C"],
) -> tuple[Int32[Array, " P"], Float[Array, " P"]]:
    """The nearest code of each point, and ||codebook[k]||^2 - 2 <point, codebook[k]> of that code."""
    # ||z||^2 is the same for every code. Full precision, since rounded products swap close codes.
    products = jnp.matmul(points, codebook.T, precision=jax.lax.Precision.HIGHEST)  # [P, C]
    distances = norms[None, :] - 2 * products
    # On a CPU XLA vectorizes min but not argmin: find the group of codes by min, then the code within its
    # group (5 ms instead of 37 ms for 4,096 points and 1,024 codes).
    size = math.gcd(codebook.shape[0], 32)
    groups = distances.reshape(points.shape[0], -1, size)
    group = jnp.argmin(jnp.min(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    codes = (group * size + jnp.argmin(members, axis=-1)).astype(jnp.int32)
    return codes, jnp.min(members, axis=-1)


def quantize(
    z: Float[Array | np.ndarray, "B R S D"],
    codebook: Float[Array | np.ndarray, "C D"],
    grids: Grids,
    is_residual: bool = False,
) -> Int32[Array, "B num_codes"]:
    """The codes of every level by SPAE's streaming average quantization; passes no gradient.

    A position that has n codes already takes as its next one the code nearest to
    z_l = (n + 1) z - sum of those n vectors, so that their plain average approaches z. With `is_residual`,
    residual quantization, z_l = z - sum of those n vectors, so that their sum approaches z.
    """
    z, codebook = jax.lax.stop_gradient((z, codebook))
    sums = jnp.zeros_like(z)
    codes = []
    for grid, counts in zip(grids, word_counts(grids), strict=True):
        rows, columns = _places(grid, grids)
        target = _target(z, sums, counts, (rows, columns), is_residual)
        level_codes = nearest_codes(target, codebook)
        sums = sums.at[:, rows, columns].add(codebook[level_codes])
        codes.append(level_codes.reshape(z.shape[0], -1))
    return jnp.concatenate(codes, axis=1)


def level_targets(
    z: Float[Array | np.ndarray, "B R S D"],
    codes: Int[Array | np.ndarray, "B num_codes"],
    codebook: Float[Array | np.ndarray, "C D"],
    grids: Grids,
    is_residual: bool = False,
) -> list[Float[Array, "B _ _ D"]]:
    """z_l of each level, to which `quantize` takes the nearest code; differentiable in z only."""
    codebook, targets = jax.lax.stop_gradient(codebook), []
    sums = jnp.zeros_like(jax.lax.stop_gradient(z))
    ends = code_grids.ends(grids)
    for grid, end, counts in zip(grids, ends, word_counts(grids), strict=True):
        rows, columns = _places(grid, grids)
        targets.append(_target(z, sums, counts, (rows, columns), is_residual))
        level_codes = codes[:, end - grid[0] * grid[1] : end].reshape(-1, *grid)
        sums = sums.at[:, rows, columns].add(codebook[level_codes])
    return targets


def _target(
    z: Float[Array | np.ndarray, "B R S D"],
    sums: Float[Array, "B R S D"],
    counts: Int32[np.ndarray, "R S"],
    places: tuple[slice, slice],
    is_residual: bool,
) -> Float[Array, "B r s D"]:
    """z_l at some places; `sums` are of the codes before it, `counts` include its own."""
    rows, columns = places
    weight = 1 if is_residual else counts[rows, columns].astype(np.float32)[None, :, :, None]
    return weight * z[:, rows, columns] - sums[:, rows, columns]


def running_averages(
    codes: Int[Array | np.ndarray, "B num_codes"],
    codebook: Float[Array | np.ndarray, "C D"],
    grids: Grids,
    is_residual: bool = False,
) -> list[Float[Array, "B R S D"]]:
    """zhat_<=l for each level of `codes`: the mean of the vectors that a position has so far.

    Args:
      codes: the codes of all levels or of the first few.
      codebook: the result is differentiable in it.
      grids: the whole pyramid.
      is_residual: their sum in place of the mean, for codes of residual quantization.

    Returns:
      One array per level of `codes`, zero where a position has no code yet.

    Raises:
      ValueError: `codes` ends inside a level.
    """
    ends = code_grids.ends(grids)
    if codes.shape[1] not in ends:
        raise ValueError(f"{codes.shape[1]} codes end inside a level; levels end at {ends}")
    sums = jnp.zeros((codes.shape[0], *grids[-1], codebook.shape[1]), codebook.dtype)
    averages = []
    for grid, end, counts in zip(grids, ends, word_counts(grids), strict=True):
        if end > codes.shape[1]:
            break
        level_codes = codes[:, end - grid[0] * grid[1] : end].reshape(-1, *grid)
        rows, columns = _places(grid, grids)
        sums = sums.at[:, rows, columns].add(codebook[level_codes])
        total = np.ones_like(counts) if is_residual else np.maximum(counts, 1)
        averages.append(sums / total.astype(np.float32)[None, :, :, None])
    return averages


def straight_through(
    z: Float[Array | np.ndarray, "B R S D"], average: Float[Array, "B R S D"], grids: Grids
) -> Float[Array, "B R S D"]:
    """Exactly the value of `average`; its gradient goes to z unchanged.

    Positions without a code pass no gradient, since their value does not depend on z.
    """
    covered = jnp.asarray(word_counts(grids)[-1] > 0)[None, :, :, None]
    # z - z is exactly zero; z + (average - z) would round.
    passed = jnp.where(covered, z - jax.lax.stop_gradient(z), jnp.zeros_like(z))
    return jax.lax.stop_gradient(average) + passed


def quantization_losses(
    z: Float32[Array, "B R S D"], averages: Sequence[Float32[Array, "B R S D"]], grids: Grids
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Codebook loss and commitment loss.

    Each is the sum of `latent_errors` over levels. The codebook loss has a gradient in the codebook only,
    the commitment loss in z only.
    """
    fixed, fixed_averages = jax.lax.stop_gradient((z, averages))
    codebook_loss = jnp.sum(latent_errors(fixed, averages, grids))
    return codebook_loss, jnp.sum(latent_errors(z, fixed_averages, grids))


def latent_errors(
    z: Float32[Array, "B R S D"], averages: Sequence[Float32[Array, "B R S D"]], grids: Grids
) -> Float32[Array, " levels"]:
    """||z - zhat_<=l||^2 of each level, averaged over D and the positions that have a code by then."""
    errors = []
    for counts, average in zip(word_counts(grids), averages, strict=True):
        covered = (counts > 0).astype(np.float32)
        size = np.float32(covered.sum() * z.shape[0] * z.shape[-1])
        errors.append(jnp.sum(covered[None, :, :, None] * (z - average) ** 2) / size)
    return jnp.stack(errors)


def target_squares(
    z: Float32[Array, "B R S D"],
    averages: Sequence[Float32[Array, "B R S D"]],
    grids: Grids,
    is_residual: bool = False,
) -> Float32[Array, " levels"]:
    """Mean squared entry of z_l, to which `quantize` takes the nearest code, at the places of each level.

    Args:
      z: the latents.
      averages: of `running_averages`.
      grids: the whole pyramid.
      is_residual: as for `quantize`.
    """
    sums, squares = jnp.zeros_like(z), []
    for grid, counts, average in zip(grids, word_counts(grids), averages, strict=True):
        places = _places(grid, grids)
        squares.append(jnp.mean(_target(z, sums, counts, places, is_residual) ** 2))
        total = np.ones_like(counts) if is_residual else counts
        sums = average * total.astype(np.float32)[None, :, :, None]
    return jnp.stack(squares)


def code_counts(
    codes: Int[Array | np.ndarray, "..."], codebook_size: int
) -> Float32[Array, " {codebook_size}"]:
    """How often each code occurs."""
    return jnp.zeros(codebook_size, jnp.float32).at[codes.reshape(-1)].add(1.0)


def usage(counts: Float[Array | np.ndarray, " C"]) -> Float32[Array, ""]:
    """The fraction of codes with a positive count; `counts` may be frequencies."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: Float[Array | np.ndarray, " C"]) -> Float32[Array, ""]:
    """exp of the entropy of the code distribution, in 1..C; `counts` may be frequencies."""
    share = counts / jnp.sum(counts)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(share), 0.0)))


def revive_codes(
    codebook: Float32[Array, "C D"],
    is_dead: Bool[Array, " C"],
    points: Float32[Array, "P D"],
    errors: Float32[Array, " P"],
    key: Key[Array, ""],
) -> Float32[Array, "C D"]:
    """Moves dead codes to points with a large quantization error.

    Points are sampled without replacement with probability proportional to their squared error, as in
    k-means++, so that a revived code lowers the error where it is largest.

    Args:
      codebook: the codebook.
      is_dead: which codes to move; with more than P of them, the last ones stay.
      points: the vectors being quantized.
      errors: the squared distance of each to its code.
      key: random key.

    Returns:
      The new codebook; codes that are not dead keep their bits.
    """
    noise = jax.random.gumbel(key, errors.shape)
    count = min(codebook.shape[0], points.shape[0])
    _, chosen = jax.lax.top_k(jnp.log(errors) + noise, count)
    # Dead codes take the sampled points in order, whatever their ids.
    rank = jnp.cumsum(is_dead) - 1
    is_moved = is_dead & (rank < count)
    return jnp.where(is_moved[:, None], points[chosen[jnp.minimum(rank, count - 1)]], codebook)


def init_kmeans(
    points: Float32[Array, "P D"], num_clusters: int, key: Key[Array, ""], num_steps: int = 12
) -> Float32[Array, "{num_clusters} D"]:
    """Lloyd's k-means from k-means++ seeds; deterministic for a given key.

    Returns:
      The cluster centers.

    Raises:
      ValueError: there are fewer points than clusters.
    """
    if points.shape[0] < num_clusters:
        raise ValueError(f"{points.shape[0]} points cannot seed {num_clusters} clusters")
    pick_key, seed_key, *step_keys = jax.random.split(key, num_steps + 2)
    # Seeding passes over all points once per cluster, so it uses a sample of them.
    sample = jax.random.permutation(pick_key, points.shape[0])[: 16 * num_clusters]
    seeds = _seed(points[sample], num_clusters, seed_key)
    return _lloyd(points, seeds, jnp.stack(step_keys))


@jax.jit
def _lloyd(
    points: Float32[Array, "P D"], centers: Float32[Array, "C D"], keys: Key[Array, " steps"]
) -> Float32[Array, "C D"]:
    def step(centers, key):
        codes = jax.lax.map(
            lambda point: nearest_codes(point, centers), points, batch_size=_points_at_once(centers)
        )
        counts = code_counts(codes, centers.shape[0])
        sums = jnp.zeros_like(centers).at[codes].add(points)
        means = sums / jnp.maximum(counts, 1)[:, None]
        errors = _squared_errors(points, means)
        return revive_codes(means, counts < 1, points, errors, key), None

    return jax.lax.scan(step, centers, keys)[0]


@functools.partial(jax.jit, static_argnames="num_clusters")
def _seed(
    points: Float32[Array, "P D"], num_clusters: int, key: Key[Array, ""]
) -> Float32[Array, "{num_clusters} D"]:
    """k-means++: samples each center in proportion to its squared distance from the previous ones."""
    first_key, *_ = keys = jax.random.split(key, num_clusters)
    first = points[jax.random.randint(first_key, (), 0, points.shape[0])]

    def sample(errors, key):
        chosen = points[jax.random.categorical(key, jnp.log(errors))]
        return jnp.minimum(errors, jnp.sum((points - chosen[None]) ** 2, axis=-1)), chosen

    errors = jnp.sum((points - first[None]) ** 2, axis=-1)
    _, rest = jax.lax.scan(sample, errors, keys[1:])
    return jnp.concatenate([first[None], rest])


def _squared_errors(
    points: Float32[Array, "P D"], codebook: Float32[Array, "C D"]
) -> Float32[Array, " P"]:
    """The squared distance of each point to its nearest code."""

    def error(point):
        return jnp.sum((point - codebook[nearest_codes(point, codebook)]) ** 2)

    return jax.lax.map(error, points, batch_size=_points_at_once(codebook))


def _points_at_once(codebook: Float32[Array, "C D"]) -> int:
    return max(1, min(4096, _MAX_DISTANCES // codebook.shape[0]))
