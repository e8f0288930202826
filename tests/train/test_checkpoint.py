"""State and data iterator are restored together, in the requested layout, or refused with a clear error."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import digests, sharding
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


def test_the_newest_and_every_nth_are_kept(tmp_path):
    state, batches = make_state(), make_batches()
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(at_step(state, step), batches)
    checkpoints.close()
    assert steps_of(tmp_path / "checkpoints") == ["4", "6", "7"]


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
    assert "checkpoint 4 cannot be read; resuming from 2" in capfd.readouterr().err
    # The run reaches that step again and saves it.
    assert checkpoints.latest_step == 2
    checkpoints.save(at_step(state, 4), batches)
    checkpoints.close()
    again = checkpoint.Checkpoints(folder, keep=2)
    assert again.latest_step == 4
    assert int(again.restore(make_state(), make_batches()).step) == 4
    again.close()


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
