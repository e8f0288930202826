"""The vector quantizer (SPAE) against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.core import code_grids
from rag_mm.core.errors import UserError
from rag_mm.ops import quantize

PAPER = tuple((side, side) for side in (1, 2, 4, 8, 16, 16))
SMALL = tuple((side, side) for side in (1, 2, 4, 4, 4))
WIDE = ((1, 3), (2, 6), (4, 12))


def _case(grids, dim=5, size=40, batch=2):
    rng = np.random.default_rng(0)
    z = 0.6 * rng.normal(size=(batch, *grids[-1], dim)).astype(np.float32)
    return z, rng.normal(size=(size, dim)).astype(np.float32)


def _rows(count, full):
    """The formula of the paper, counted from one."""
    stride = full // count
    return [stride * i - -(-stride // 2) for i in range(1, count + 1)]


def _naive(z, codebook, grids):
    """SPAE's streaming average quantization, one position at a time. Returns codes, targets and averages."""
    batch, *full, dim = z.shape
    codes, targets, averages = [], [], []
    words = [[[[] for _ in range(full[1])] for _ in range(full[0])] for _ in range(batch)]
    for grid in grids:
        level_codes = np.zeros((batch, *grid), np.int32)
        level_targets = np.zeros((batch, *grid, dim), np.float32)
        for b in range(batch):
            for i, y in enumerate(_rows(grid[0], full[0])):
                for j, x in enumerate(_rows(grid[1], full[1])):
                    target = z[b, y, x] + sum(z[b, y, x] - codebook[k] for k in words[b][y][x])
                    k = int(np.argmin(((target - codebook) ** 2).sum(-1)))
                    words[b][y][x].append(k)
                    level_codes[b, i, j], level_targets[b, i, j] = k, target
        codes.append(level_codes.reshape(batch, -1))
        targets.append(level_targets)
        averages.append(
            np.array(
                [
                    [[codebook[w].mean(0) if w else np.zeros(dim) for w in row] for row in image]
                    for image in words
                ]
            )
        )
    return np.concatenate(codes, 1), targets, averages


def test_levels_quantize_the_rows_of_the_paper():
    rows = [np.arange(16)[code_grids.patches(side, 16)].tolist() for side, _ in PAPER]
    assert rows[:3] == [[8], [4, 12], [2, 6, 10, 14]]
    assert rows[3] == list(range(1, 16, 2))
    assert rows[4] == rows[5] == list(range(16))


def test_pyramid_has_the_counts_of_the_paper():
    counts = quantize.word_counts(PAPER)
    assert code_grids.ends(PAPER) == [1, 5, 21, 85, 341, 597]
    assert counts[3].max() == 1 and (counts[3] == 0).sum() == 171
    assert (counts[5] == 3).sum() == 85 and (counts[5] == 2).sum() == 171


@pytest.mark.parametrize("levels", [(), (3, 8), (0, 8)])
def test_levels_that_do_not_divide_the_grid_are_an_error(levels):
    with pytest.raises(UserError, match="pyramid"):
        quantize.check_levels(levels)


@pytest.mark.parametrize("size", [64, 96, 7, 1])  # groups of 32, of 32, of one, one code
def test_nearest_codes_is_argmin_of_squared_distance(size):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(3, 50, 6)).astype(np.float32)
    codebook = rng.normal(size=(size, 6)).astype(np.float32)
    expected = ((z[:, :, None] - codebook) ** 2).sum(-1).argmin(-1)
    codes = quantize.nearest_codes(z, codebook)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)


def test_ties_go_to_the_lowest_code():
    codebook = np.ones((64, 4), np.float32)
    assert quantize.nearest_codes(np.zeros((1, 4), np.float32), codebook).tolist() == [0]


@pytest.mark.parametrize("size", [32, 64, 95, 97, 200])
def test_chunks_of_the_codebook_give_the_same_codes(size, monkeypatch):
    """In chunks of 32 and 64 codes, which the sizes fill, exceed or leave partly empty."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=(3, 50, 6)).astype(np.float32)
    codebook = rng.normal(size=(size, 6)).astype(np.float32)
    half = -(-size // 2)
    codebook[half:] = codebook[: size - half]  # Nearly all codes occur twice.
    whole = quantize.nearest_codes(z, codebook)
    assert whole.max() < half
    for at_once in (1, 150 * 64):
        monkeypatch.setattr(quantize, "_MAX_DISTANCES", at_once)
        np.testing.assert_array_equal(quantize.nearest_codes(z, codebook), whole)


def test_chunks_change_no_gradient(monkeypatch):
    z, codebook = _case(SMALL, size=100)

    def loss(z, codebook):
        codes = quantize.quantize(z, codebook, SMALL)
        averages = quantize.running_averages(codes, codebook, SMALL)
        losses = quantize.quantization_losses(z, averages, SMALL)
        return sum(losses) + (quantize.straight_through(z, averages[-1], SMALL) ** 3).sum()

    whole = jax.jit(jax.grad(loss, (0, 1)))(z, codebook)
    monkeypatch.setattr(quantize, "_MAX_DISTANCES", 1)
    chunked = jax.jit(jax.grad(lambda *args: loss(*args), (0, 1)))(z, codebook)
    for found, expected in zip(chunked, whole, strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(found, expected)


def test_all_distances_are_never_in_memory_at_once():
    """65,536 positions and 8,192 codes have 2 GiB of distances; compiled only."""
    z = jax.ShapeDtypeStruct((256, 16, 16, 256), jnp.float32)
    codebook = jax.ShapeDtypeStruct((8192, 256), jnp.float32)
    program = jax.jit(quantize.nearest_codes).lower(z, codebook).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**29


@pytest.mark.parametrize("grids", [((4, 4),), SMALL, ((1, 1), (4, 4)), PAPER, WIDE])
def test_streaming_averages_match_the_loops(grids):
    z, codebook = _case(grids)
    codes, _, averages = _naive(z, codebook, grids)
    ours = jax.jit(quantize.quantize, static_argnums=2)(z, codebook, grids)
    np.testing.assert_array_equal(ours, codes)
    for found, expected in zip(
        quantize.running_averages(ours, codebook, grids), averages, strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_error_after_a_level_is_the_levels_error_divided_by_the_number_of_codes():
    z, codebook = _case(SMALL)
    codes, targets, _ = _naive(z, codebook, SMALL)
    averages = quantize.running_averages(jnp.asarray(codes), codebook, SMALL)
    counts = quantize.word_counts(SMALL)
    end = 0
    for level, (side, _) in enumerate(SMALL):
        start, end = end, end + side * side
        grid = codes[:, start:end].reshape(-1, side, side)
        rows = code_grids.patches(side, 4)
        error = np.asarray(averages[level])[:, rows, rows] - z[:, rows, rows]
        num_codes = counts[level][rows, rows][None, :, :, None]  # n + 1
        np.testing.assert_allclose(
            error, (codebook[grid] - targets[level]) / num_codes, atol=1e-5, rtol=1e-4
        )


def test_one_level_is_exactly_plain_vector_quantization():
    z, codebook = _case(((8, 8),))
    codes = quantize.quantize(z, codebook, ((8, 8),))
    np.testing.assert_array_equal(codes, quantize.nearest_codes(z, codebook).reshape(2, 64))
    (average,) = quantize.running_averages(codes, codebook, ((8, 8),))
    np.testing.assert_array_equal(average, codebook[np.asarray(codes).reshape(2, 8, 8)])


def test_more_levels_of_the_full_grid_lower_the_error():
    grids = ((4, 4),) * 6
    z, codebook = _case(grids, dim=8, size=512)
    averages = quantize.running_averages(quantize.quantize(z, codebook, grids), codebook, grids)
    errors = [float(np.mean((a - z) ** 2)) for a in averages]
    assert errors[-1] < 0.2 * errors[0]


def test_codes_of_the_first_levels_decode_and_of_half_a_level_do_not():
    z, codebook = _case(SMALL)
    codes = quantize.quantize(z, codebook, SMALL)
    whole = quantize.running_averages(codes, codebook, SMALL)
    part = quantize.running_averages(codes[:, :21], codebook, SMALL)
    assert len(part) == 3
    np.testing.assert_array_equal(part[-1], whole[2])
    with pytest.raises(ValueError, match="inside a level"):
        quantize.running_averages(codes[:, :20], codebook, SMALL)


def test_straight_through_has_the_value_of_the_average_and_its_gradient():
    grids = ((1, 1), (2, 2))
    z, _ = _case(grids)
    average = jnp.asarray(_case(grids)[0][::-1].copy())
    weights = jnp.asarray(np.random.default_rng(2).normal(size=z.shape).astype(np.float32))
    np.testing.assert_array_equal(quantize.straight_through(z, average, grids), average)
    to_z, to_average = jax.grad(
        lambda z, a: jnp.sum(weights * quantize.straight_through(z, a, grids)), (0, 1)
    )(jnp.asarray(z), average)
    np.testing.assert_array_equal(to_z, weights)
    assert not to_average.any()


def test_positions_without_a_code_pass_no_gradient():
    grids = ((2, 2), (4, 4))
    z = jnp.ones((1, 4, 4, 3))
    grad = jax.grad(lambda z: jnp.sum(quantize.straight_through(z, z, grids)))(z)
    assert grad.all()  # The full grid covers every position.
    counts = quantize.word_counts(grids)[0]
    assert sorted(np.argwhere(counts).tolist()) == [[1, 1], [1, 3], [3, 1], [3, 3]]


def test_codebook_loss_moves_the_codebook_and_commitment_loss_the_encoder():
    z, codebook = _case(SMALL)
    z, codebook = jnp.asarray(z), jnp.asarray(codebook)
    codes = quantize.quantize(z, codebook, SMALL)

    def losses(z, codebook):
        averages = quantize.running_averages(codes, codebook, SMALL)
        return quantize.quantization_losses(z, averages, SMALL)

    to_codebook, to_encoder = losses(z, codebook)
    expected = 0.0
    for counts, average in zip(
        quantize.word_counts(SMALL), quantize.running_averages(codes, codebook, SMALL), strict=True
    ):
        expected += np.asarray((average - z) ** 2)[:, counts > 0].mean()
    np.testing.assert_allclose([to_codebook, to_encoder], expected, rtol=1e-5)
    grads = [jax.grad(lambda z, c, i=i: losses(z, c)[i], (0, 1))(z, codebook) for i in (0, 1)]
    assert not grads[0][0].any() and grads[0][1].any()
    assert grads[1][0].any() and not grads[1][1].any()
    used = np.unique(codes)
    assert not np.delete(np.asarray(grads[0][1]), used, axis=0).any()


def test_usage_and_perplexity_of_counts_and_of_frequencies():
    counts = quantize.code_counts(jnp.array([[0, 0], [1, 3]]), 4)
    assert counts.tolist() == [2, 1, 0, 1]
    for scale in (1.0, 0.25):
        assert float(quantize.usage(counts * scale)) == 0.75
        np.testing.assert_allclose(quantize.perplexity(counts * scale), 2**1.5, rtol=1e-6)
    np.testing.assert_allclose(quantize.perplexity(jnp.ones(64)), 64, rtol=1e-5)


def test_dead_codes_move_to_points_with_a_large_error_and_others_stay():
    codebook = jnp.zeros((4, 2)).at[1].set(1.0)
    points = jnp.concatenate([jnp.zeros((50, 2)), jnp.full((2, 2), 9.0), jnp.full((2, 2), -9.0)])
    errors, is_dead = jnp.sum(points**2, axis=1), jnp.array([False, False, True, True])
    revived = quantize.revive_codes(codebook, is_dead, points, errors, jax.random.key(0))
    np.testing.assert_array_equal(revived[:2], codebook[:2])
    assert (jnp.abs(revived[2:]) == 9).all()
    # One point for three dead codes: the first of them takes it.
    is_dead = jnp.array([False, True, True, True])
    revived = quantize.revive_codes(codebook, is_dead, points[-1:], errors[-1:], jax.random.key(0))
    np.testing.assert_array_equal(revived, codebook.at[1].set(-9.0))


def test_kmeans_finds_clusters_uses_every_center_and_is_deterministic():
    rng = np.random.default_rng(0)
    blobs = rng.normal(size=(16, 3)).astype(np.float32) * 10
    points = jnp.asarray(np.repeat(blobs, 30, axis=0) + rng.normal(size=(480, 3)).astype("f") / 50)
    centers = quantize.init_kmeans(points, 16, jax.random.key(3))
    nearest = np.sqrt(((blobs[:, None] - np.asarray(centers)) ** 2).sum(-1)).min(1)
    assert nearest.max() < 0.1
    counts = quantize.code_counts(quantize.nearest_codes(points, centers), 16)
    assert float(quantize.usage(counts)) == 1.0
    again = quantize.init_kmeans(points, 16, jax.random.key(3))
    np.testing.assert_array_equal(centers, again)
    with pytest.raises(ValueError, match="cannot seed"):
        quantize.init_kmeans(points[:9], 16, jax.random.key(0))


@pytest.mark.parametrize("is_residual", [False, True])
def test_each_code_is_the_nearest_to_its_levels_target(is_residual):
    z, codebook = map(jnp.asarray, _case(SMALL))
    codes = quantize.quantize(z, codebook, SMALL, is_residual)
    targets = quantize.level_targets(z, codes, codebook, SMALL, is_residual)
    nearest = [quantize.nearest_codes(target, codebook).reshape(2, -1) for target in targets]
    np.testing.assert_array_equal(jnp.concatenate(nearest, axis=1), codes)
    averages = quantize.running_averages(codes, codebook, SMALL, is_residual)
    squares = quantize.target_squares(z, averages, SMALL, is_residual)
    wanted = [np.square(target).mean() for target in targets]
    np.testing.assert_allclose(squares, wanted, rtol=1e-4)


def test_residual_codes_add_up_to_z_less_what_the_last_level_leaves():
    z, codebook = map(jnp.asarray, _case(SMALL))
    codes = quantize.quantize(z, codebook, SMALL, is_residual=True)
    sums = quantize.running_averages(codes, codebook, SMALL, is_residual=True)
    last = quantize.level_targets(z, codes, codebook, SMALL, is_residual=True)[-1]
    left = last - codebook[codes[:, -16:]].reshape(last.shape)
    np.testing.assert_allclose(sums[-1], z - left, atol=1e-5)


def test_a_streaming_average_leaves_a_share_of_its_last_target():
    """zhat - z = (e(k) - z_l) / (n + 1), with n earlier vectors."""
    z, codebook = map(jnp.asarray, _case(SMALL))
    codes = quantize.quantize(z, codebook, SMALL)
    average = quantize.running_averages(codes, codebook, SMALL)[-1]
    last = quantize.level_targets(z, codes, codebook, SMALL)[-1]
    counts = quantize.word_counts(SMALL)[-1][None, :, :, None]
    step = (codebook[codes[:, -16:]].reshape(last.shape) - last) / counts.astype(np.float32)
    np.testing.assert_allclose(average - z, step, atol=1e-5)
