"""State and data iterator are restored together, in the requested layout, or refused with a clear error."""

import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import checksums, digests, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.nn import layers, param_trees
from rag_mm.train import checkpoint, train_state

# Orbax leaves coroutines behind when it refuses to load.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

OPTIMIZER = optax.adam(1e-3)


class Model(nnx.Module):
    """One matrix over two mesh axes and a bias, `width` wide."""

    def __init__(self, width=8, use_bias=True):
        rngs = nnx.Rngs(params=0)
        shape = ((width,), (4,), ("embed", "mlp"))
        self.linear = layers.Linear(*shape, use_bias=use_bias, rngs=rngs)


def make_state(mesh_shape=(1, 1, 1), value=1.0, **options):
    mesh = sharding.make_mesh(*mesh_shape)
    _, abstract = param_trees.describe(lambda: Model(**options), mesh)
    filled = jax.tree.map(
        lambda leaf: jax.device_put(
            value * np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), leaf.sharding
        ),
        abstract,
    )
    return train_state.init_state(filled, OPTIMIZER, mesh)


def at_step(state, step):
    """A state as if trained to `step`, with a distinct value in every leaf of the optimizer state."""
    leaves, structure = jax.tree.flatten(state.opt_state)
    leaves = [leaf + jnp.asarray(i, leaf.dtype) for i, leaf in enumerate(leaves)]
    opt_state = jax.tree.unflatten(structure, leaves)
    return train_state.TrainState(state.step + step, state.params, opt_state)


def make_batches():
    return pipeline.make_batches(np.arange(16), 4, 0, lambda x, rng: {"x": np.int32(x)})


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint at step 5 of a state on 4x2x1 devices, three batches read, and the next batch."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    state, batches = at_step(make_state((4, 2, 1)), 5), make_batches()
    for _ in range(3):
        next(batches)
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.latest_step is None
    checkpoints.save(state, batches)
    checkpoints.close()
    return folder, state, next(batches)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_a_checkpoint_is_restored_in_the_layout_of_the_new_state(saved, mesh):
    folder, state, next_batch = saved
    batches, fresh = make_batches(), make_state(mesh, value=0.0)
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.latest_step == 5
    restored = checkpoints.restore(fresh, batches)
    checkpoints.close()
    assert_same(restored, state)
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (restored, fresh)]
    assert shardings[0] == shardings[1]
    assert_same(next(batches), next_batch)


@pytest.mark.parametrize(
    "other",
    [dict(width=16), dict(width=4), dict(use_bias=False)],
    ids=["wider", "narrower", "fewer parameters"],
)
def test_a_checkpoint_of_another_model_is_refused(saved, other):
    checkpoints = checkpoint.Checkpoints(saved[0])
    with pytest.raises(UserError, match="checkpoints"):
        checkpoints.restore(make_state(**other), make_batches())
    checkpoints.close()


def test_a_checkpoint_of_another_optimizer_is_refused(saved):
    checkpoints = checkpoint.Checkpoints(saved[0])
    state = make_state()
    other = train_state.init_state(state.params, optax.sgd(1e-3), sharding.make_mesh())
    with pytest.raises(UserError, match="checkpoints"):
        checkpoints.restore(other, make_batches())
    checkpoints.close()


def test_a_checkpoint_is_kept_in_a_folder_of_any_name(tmp_path):
    """The names are patterns of files, parts of URLs, options, and words that a shell would replace."""
    odd = "a b/#1/50%/%20/what?/[0:3]/[x]/**/c:d/-x/~/$HOME/line\nline/é 👩‍👧"
    state, folder = at_step(make_state(), 3), tmp_path / odd
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(state, make_batches())
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(folder)
    restored = checkpoints.restore(make_state(value=0.0), make_batches())
    checkpoints.close()
    assert_same(restored, state)
    checkpoint.save_params(folder / "params", state.params)
    checkpoint.save_params(tmp_path / "plain", state.params)
    loaded = checkpoint.load_params(folder / "params", make_state(value=0.0).params)
    assert_same(loaded, state.params)
    assert digests.folder_digests(folder / "params") == digests.folder_digests(tmp_path / "plain")


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    state, batches = make_state(), make_batches()
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step in (2, 2, 4):
        checkpoints.save(at_step(state, step), batches)
    assert checkpoints.latest_step == 4
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["4"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    """Files left by a kill during the write are ignored."""
    folder = tmp_path / "checkpoints"
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(at_step(make_state(), 2), make_batches())
    checkpoints.close()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "4.orbax-checkpoint-tmp" / "params").mkdir()
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.latest_step == 2
    assert int(checkpoints.restore(make_state(), make_batches()).step) == 2
    checkpoints.close()


def test_parameters_are_loaded_in_any_layout_and_replace_earlier_ones(tmp_path):
    checkpoint.save_params(tmp_path / "params", make_state(value=3.0).params)
    params = make_state((4, 2, 1)).params
    checkpoint.save_params(tmp_path / "params", params)
    _, abstract = param_trees.describe(Model, sharding.make_mesh(2, 2, 2))
    loaded = checkpoint.load_params(tmp_path / "params", abstract)
    assert_same(loaded, params)
    specs = [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (loaded, abstract)]
    assert specs[0] == specs[1]


def test_parameters_missing_or_of_another_model_are_refused(tmp_path):
    folder = tmp_path / "params"
    describe = lambda **options: param_trees.describe(lambda: Model(**options), None)[1]
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load_params(folder, describe())
    checkpoint.save_params(folder, make_state().params)
    for other in (dict(width=16), dict(width=4), dict(use_bias=False)):
        with pytest.raises(UserError, match="this model's parameters"):
            checkpoint.load_params(folder, describe(**other))
    more = describe() | {"norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(UserError, match="this model's parameters"):
        checkpoint.load_params(folder, more)


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_newest_are_kept_each_with_its_checksums(tmp_path):
    state, batches = make_state(), make_batches()
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in range(1, 6):
        checkpoints.save(at_step(state, step), batches)
    checkpoints.close()
    assert steps_of(tmp_path / "checkpoints") == ["4", "5"]
    for step in ("4", "5"):
        checksums.check(tmp_path / "checkpoints" / step)


def damage(folder):
    """Truncates every data file of a checkpoint, as a full or broken disk might."""
    for path in sorted((folder / "params").rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_newest_checkpoint_is_renamed_with_a_warning(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    state, batches = make_state(value=2.0), make_batches()
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    next(batches)
    checkpoints.save(at_step(state, 2), batches)
    expected = next(batches)
    checkpoints.save(at_step(state, 4), batches)
    checkpoints.close()
    damage(folder / "4")

    checkpoints, batches = checkpoint.Checkpoints(folder, keep=2), make_batches()
    restored = checkpoints.restore(make_state(value=0.0), batches)
    assert_same(restored, at_step(state, 2))
    assert_same(next(batches), expected)
    said = capfd.readouterr().err
    assert "checkpoint 4 is damaged" in said and said.endswith("; resuming from 2\n")
    assert steps_of(folder) == ["2", "damaged-4"]
    # The run reaches that step again and saves it.
    assert checkpoints.latest_step == 2
    checkpoints.save(at_step(state, 4), batches)
    checkpoints.close()
    again = checkpoint.Checkpoints(folder, keep=2)
    assert again.latest_step == 4
    assert int(again.restore(make_state(), make_batches()).step) == 4
    again.close()

    # The same step once more: the folder that was put aside before is replaced.
    damage(folder / "4")
    again = checkpoint.Checkpoints(folder, keep=2)
    assert int(again.restore(make_state(), make_batches()).step) == 2
    again.close()
    assert steps_of(folder) == ["2", "damaged-4"]


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """Checkpoints of steps 2 and 4 of a state of which nearly all bytes are values."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (2, 4):
        checkpoints.save(at_step(make_state(width=256), step), make_batches())
    checkpoints.close()
    return folder


def restored_step(folder):
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    try:
        return int(checkpoints.restore(make_state(width=256), make_batches()).step)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_among_the_values_is_found(two_saves, tmp_path, seed):
    """Without the list of checksums most of these are restored as other values."""
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    stores = [p for p in (tmp_path / "checkpoints" / "4").rglob("d/*") if p.is_file()]
    rng, path = np.random.default_rng(seed), max(stores, key=lambda p: p.stat().st_size)
    flipped = bytearray(path.read_bytes())
    flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
    path.write_bytes(flipped)
    assert restored_step(tmp_path / "checkpoints") == 2
    assert steps_of(tmp_path / "checkpoints") == ["2", "damaged-4"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": []}', '{"algorithm": "sha256", "files": {}}']
)
def test_a_damaged_list_of_checksums_is_a_damaged_checkpoint(two_saves, tmp_path, text):
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "4" / checksums.NAME).write_text(text)
    assert restored_step(tmp_path / "checkpoints") == 2


def test_a_checkpoint_without_checksums_is_restored_with_a_warning(two_saves, tmp_path, capfd):
    """As older versions wrote it, or a process that was killed just before it wrote the list."""
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "4" / checksums.NAME).unlink()
    assert restored_step(tmp_path / "checkpoints") == 4
    assert "checkpoint 4 has no checksums, so it is restored unchecked" in capfd.readouterr().err


def test_a_list_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    def full(folder):
        raise UserError(f"{folder} cannot be written: No space left on device.")

    monkeypatch.setattr(checksums, "write", full)
    checkpoints, committed = checkpoint.Checkpoints(tmp_path / "checkpoints"), threading.Event()
    checkpoints.save(at_step(make_state(), 2), make_batches(), committed.set)
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.wait()
    checkpoints.close()
    assert not committed.is_set()


def test_at_the_end_only_the_newest_is_left(two_saves, tmp_path):
    """Whatever a kill, a damaged checkpoint or a deletion that was ended halfway have left."""
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    for name in ("damaged-3", ".deleted-1", "6.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    checkpoint.keep_last(tmp_path / "checkpoints")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert restored_step(tmp_path / "checkpoints") == 4
    checkpoint.keep_last(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_only_damaged_checkpoints_is_an_error(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(at_step(make_state(), 2), make_batches())
    checkpoints.close()
    damage(folder / "2")
    checkpoints = checkpoint.Checkpoints(folder)
    with pytest.raises(UserError, match="damaged"):
        checkpoints.restore(make_state(), make_batches())
    checkpoints.close()
    assert steps_of(folder) == ["2"]


@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 4, 1), (1, 8, 1), (1, 1, 1)], ids=str)
def test_a_checkpoint_of_eight_devices_is_restored_on_four_and_one(saved, mesh):
    """8 -> 4 -> 1 and 4x2 -> 2x4, moments and counts included."""
    folder, state, _ = saved
    checkpoints = checkpoint.Checkpoints(folder)
    restored = checkpoints.restore(make_state(mesh, value=0.0), make_batches())
    checkpoints.close()
    assert_same(restored, state)
    kernel = restored.params["linear"]["kernel"]
    assert kernel.sharding.mesh.shape == dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    assert kernel.addressable_shards[0].data.shape[0] == 8 // mesh[1]


def test_later_steps_do_not_change_a_checkpoint_being_written(tmp_path):
    """`save` returns before the file is complete, and the next steps overwrite the donated state."""
    mesh = sharding.make_mesh(2, 1, 1)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = {"kernel": jax.device_put(np.ones((512, 512), np.float32), replicated)}
    state, batches = train_state.init_state(params, OPTIMIZER, mesh), make_batches()
    grow = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    checkpoints, committed = checkpoint.Checkpoints(tmp_path / "checkpoints"), threading.Event()
    expected = jax.tree.map(np.array, at_step(state, 3))
    state = at_step(state, 3)
    checkpoints.save(state, batches, committed.set)
    for _ in range(20):
        state = grow(state)
        next(batches)
    assert committed.wait(60)
    again = make_batches()
    restored = checkpoints.restore(jax.tree.map(jnp.copy, state), again)
    checkpoints.close()
    assert_same(restored, expected)
    assert again.get_state() == make_batches().get_state()


def test_a_save_leaves_no_thread_behind(tmp_path):
    state, counts = make_state(), []
    saver = checkpoint.Checkpoints(tmp_path)
    for step in range(1, 6):
        saver.save(at_step(state, step), make_batches())
        saver.wait()
        counts.append(threading.active_count())
    saver.close()
    assert counts[1] == counts[-1]
