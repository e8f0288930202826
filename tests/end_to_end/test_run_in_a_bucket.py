"""A run in a bucket: the chain, its checkpoints and manifests there are those of a run on disk."""

import jax
import jax.numpy as jnp
import local_bucket
import numpy as np
import optax
import pytest
import small_toy_page

from rag_mm.core import image_files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents, pipeline
from rag_mm.stages import chain, chain_config
from rag_mm.train import checkpoint, train_metrics, train_state

STAGES = ("toy_pairs", "fusion")


@pytest.fixture(scope="module")
def config():
    page = small_toy_page.get_config("toy")
    loop = dict(num_steps=30, log_every=5, checkpoint_every=10)
    return page | dict(fusion=page["fusion"] | dict(batch_size=32, loop=loop))


@pytest.fixture(scope="module")
def on_disk(config, tmp_path_factory):
    return chain.run_chain(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bucket():
    local_bucket.start()
    return "gs://test-bucket"


def fingerprints(run: run_folder.Run) -> list[str]:
    return [run.manifest(stage).fingerprint for stage in STAGES]


def stop_at(step: int, monkeypatch) -> None:
    """Training is interrupted at the log line of a step."""
    write = train_metrics.Log.write

    def write_or_stop(self, at, values):
        if at == step:
            raise KeyboardInterrupt
        write(self, at, values)

    monkeypatch.setattr(train_metrics.Log, "write", write_or_stop)


def make_state(step: int) -> train_state.TrainState:
    mesh = sharding.make_mesh()
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step}
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    state = train_state.init_state(placed, optax.adam(1e-3), mesh)
    return train_state.TrainState(state.step + step, state.params, state.opt_state)


def make_batches():
    return pipeline.make_batches(np.arange(16), 4, 0, lambda x, rng: {"x": np.int32(x)})


def test_the_last_whole_checkpoint_is_restored(bucket):
    folder, batches = f"{bucket}/checkpoints", make_batches()
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        next(batches)
        checkpoints.save(make_state(step), batches)
    checkpoints.close()
    assert not local_bucket.names("test-bucket/checkpoints/1/")
    following = next(batches)["x"]

    opened, restored_batches = checkpoint.Checkpoints(folder, keep=2), make_batches()
    restored = opened.restore(make_state(0), restored_batches)
    opened.close()
    np.testing.assert_array_equal(restored.params["w"], make_state(3).params["w"])
    np.testing.assert_array_equal(next(restored_batches)["x"], following)

    damaged = local_bucket.names("test-bucket/checkpoints/3/params/")
    for name in damaged:
        local_bucket.put(name, b"damaged")
    opened = checkpoint.Checkpoints(folder, keep=2)
    restored = opened.restore(make_state(0), make_batches())
    opened.close()
    np.testing.assert_array_equal(restored.params["w"], make_state(2).params["w"])
    assert local_bucket.names("test-bucket/checkpoints/damaged-3/")


def test_a_stage_resumes_is_checked_and_rebuilt(bucket):
    run, calls = run_folder.Run(run_folder.epath.Path(f"{bucket}/stages")), []

    def build(run, stage_dir):
        calls.append((stage_dir / "half.txt").exists())
        (stage_dir / "half.txt").write_text("half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"value": 1}

    with pytest.raises(KeyboardInterrupt):
        run_folder.run_stage(run, "one", {"a": 1}, (), build)
    made = run_folder.run_stage(run, "one", {"a": 1}, (), build)
    assert made.is_done and run_folder.run_stage(run, "one", {"a": 1}, (), build) == made
    with pytest.raises(UserError, match="a was 1, now 2"):
        run_folder.run_stage(run, "one", {"a": 2}, (), build)
    run_folder.run_stage(run, "one", {"a": 2}, (), build, overwrite=True)
    assert calls == [False, True, False]  # Resumed once, and built anew in an empty folder.
    assert not [name for name in local_bucket.names("test-bucket/stages/") if "deleted" in name]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_on_disk(config, on_disk, bucket, monkeypatch):
    folder = f"{bucket}/a run"
    with monkeypatch.context() as patch:
        stop_at(25, patch)
        with pytest.raises(KeyboardInterrupt):
            chain.run_chain(config, folder)
    assert local_bucket.names("test-bucket/a run/fusion/checkpoints/20/")
    assert not run_folder.open_run(folder).manifest("fusion").is_done
    run = chain.run_chain(config, folder)
    assert fingerprints(run) == fingerprints(on_disk)
    log = (on_disk.workdir / "fusion/log.jsonl").read_text()
    assert (run.workdir / "fusion/log.jsonl").read_text() == log
    checkpoints = (name.split("/") for name in local_bucket.names("test-bucket/a run/fusion/"))
    assert {parts[4] for parts in checkpoints if parts[3] == "checkpoints"} == {"30"}


@pytest.mark.slow
def test_a_changed_stage_is_built_anew_if_asked(config, on_disk, bucket):
    run = chain.run_chain(config, f"{bucket}/run")
    changed = config | dict(fusion=config["fusion"] | dict(batch_size=64))
    with pytest.raises(UserError, match="batch_size was 32, now 64"):
        chain.run_chain(changed, f"{bucket}/run")
    chain.run_chain(changed, f"{bucket}/run", overwrite=True)
    assert fingerprints(run)[0] == fingerprints(on_disk)[0]
    assert fingerprints(run)[1] != fingerprints(on_disk)[1]
    assert not [name for name in local_bucket.names("test-bucket/run/") if run_folder.TRASH in name]


def test_an_edited_file_is_found(config, bucket):
    run = chain.run_chain(config, f"{bucket}/edited", only="toy_pairs")
    (run.workdir / "toy_pairs/splits.npy").write_bytes(b"other")
    with pytest.raises(UserError, match=r"splits\.npy differs"):
        run.finished_stage("toy_pairs")


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_run_is_put_aside(config, on_disk, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(25, patch)
        with pytest.raises(KeyboardInterrupt):
            chain.run_chain(config, f"{bucket}/damaged")
    name = local_bucket.names("test-bucket/damaged/fusion/checkpoints/20/params/d/")[0]
    local_bucket.put(name, b"damaged")
    run = chain.run_chain(config, f"{bucket}/damaged")
    assert fingerprints(run) == fingerprints(on_disk)


def test_a_chain_whose_files_are_mapped_is_refused(bucket):
    """Before any stage runs."""
    config = chain_config.load("configs/quickstart.py:tiny", {})
    before = local_bucket.names("test-bucket/")
    with pytest.raises(UserError, match="'memory' must be on a file system"):
        chain.run_chain(config, f"{bucket}/mapped")
    assert local_bucket.names("test-bucket/") == before


def test_a_bucket_that_cannot_be_reached_is_one_sentence(config, bucket, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("403 Forbidden.\nMore lines.")

    monkeypatch.setattr(local_bucket.Bucket, "ls", refuse)
    with pytest.raises(UserError, match=r"^gs://secret/run cannot be reached \(403 Forbidden\)\.$"):
        chain.run_chain(config, "gs://secret/run")


def test_documents_are_read_from_a_bucket(bucket):
    pixels = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    local_bucket.put("test-bucket/documents/a.png", image_files.encode_png(pixels))
    local_bucket.put(
        "test-bucket/documents/captions.jsonl", b'{"image": "a.png", "caption": "red"}\n'
    )
    (item,) = open_documents.open_documents(f"{bucket}/documents").read(0)
    assert item.document.text == "red"
    np.testing.assert_array_equal(item.document.image, pixels)
