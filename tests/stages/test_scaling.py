"""Settings of `scale`, given on the command line, are in the program that the stage's training runs."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from rag_mm.cli import main
from rag_mm.core import renames, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.stages import chain_config
from rag_mm.train import loop

PAGE = pathlib.Path(__file__).with_name("scaled_page.py")
STAGES = {"tokenizer": "scenes", "retriever": "scenes", "copy_probe": "scenes", "fusion": "toy"}


# Every setting that each stage has, but for `num_workers`, which the program does not show.
SCALES = {
    "tokenizer": dict(mesh="2,2,1", dtype="bfloat16", remat="full", num_parts=2),
    "retriever": dict(mesh="2,2,1", dtype="bfloat16", remat="full", loss_chunks=2),
    "copy_probe": dict(mesh="2,2,2", dtype="bfloat16", remat="full", loss_chunks=4, num_parts=2),
    "fusion": dict(mesh="2,2,2", dtype="bfloat16", remat="full", loss_chunks=2),
}


class Stopped(Exception):
    """Raised in place of training."""


class Step:
    """What a stage would train: the state, the next batch, the mesh, and the step as text."""

    def __init__(self, state, step_fn, iterator, mesh):
        self.params, self.mesh = state.params, mesh
        batch = dict(next(iterator))
        batch.pop(pipeline.RECORDS)
        # The bfloat16 gradient of jax's own attention mixes dtypes.
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
            self.batch = sharding.put_batch(batch, mesh)
            lowered = step_fn.lower(state, self.batch)
        self.text, (_, self.metrics) = lowered.as_text(), lowered.out_info

    def has(self, *shape, dtype="f32"):
        return f"tensor<{'x'.join(map(str, shape))}x{dtype}>" in self.text

    @property
    def num_recomputed(self):
        """Functions that the backward pass computes anew: their inputs are kept apart by a barrier."""
        return self.text.count("optimization_barrier")


def command(workdir, preset, stage, **scale):
    words = [f"--config.{stage}.scale.{name}={value}" for name, value in scale.items()]
    fixed = ["train", f"--config={PAGE}:{preset}", f"--workdir={workdir}", f"--stage={stage}"]
    return main.main([*fixed, "--overwrite", *words])


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory):
    """Stage -> its step as the page has it, and with `SCALES`, as the command would run them."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def prepared(preset):
        stage = {"scenes": "tokenizer", "toy": "toy_pairs"}[preset]
        assert command(folder / preset, preset, stage) == 0
        return folder / preset

    @functools.cache
    def get(stage):
        found: list[Step] = []

        def stop(name, state, step_fn, iterator, mesh, *args):
            found.append(Step(state, step_fn, iterator, mesh))
            raise Stopped

        preset = STAGES[stage]
        workdir = folder / "new" if stage == "tokenizer" else prepared(preset)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "fit", stop)
            for scale in ({}, SCALES[stage]):
                with pytest.raises(Stopped):
                    command(workdir, preset, stage, **scale)
        return found

    return get


# The decoder's stage, and the others, each of which takes a while.
def stages(*names):
    slow = pytest.mark.slow
    cases = [name if name == "copy_probe" else pytest.param(name, marks=slow) for name in names]
    return pytest.mark.parametrize("stage", cases)


@stages(*STAGES)
def test_dtype_and_remat(steps_of, stage):
    """Parameters and the loss stay float32."""
    plain, scaled = steps_of(stage)
    assert "bf16" not in plain.text and "bf16" in scaled.text
    assert {leaf.dtype for leaf in jax.tree.leaves(scaled.params)} == {jnp.dtype("float32")}
    assert scaled.metrics["loss"][0].dtype == jnp.float32
    assert scaled.num_recomputed > plain.num_recomputed


@stages(*STAGES)
def test_mesh(steps_of, stage):
    """The batch is split over data and fsdp, and parameters over fsdp and tensor where they name axes."""
    plain, scaled = steps_of(stage)
    sizes = tuple(map(int, SCALES[stage]["mesh"].split(",")))
    assert plain.mesh.size == 1 and tuple(scaled.mesh.shape.values()) == sizes
    assert {leaf.sharding.spec[0] for leaf in scaled.batch.values()} == {("data", "fsdp")}
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(scaled.params)]
    assert any("fsdp" in spec and "tensor" in spec for spec in specs) == (stage != "tokenizer")


def test_the_decoders_logits_in_chunks(steps_of):
    """Of 4 rows, since the batch is in two parts."""
    plain, scaled = steps_of("copy_probe")
    rows, length = plain.batch["tokens"].shape
    vocab = len(plain.params["embedding"]["table"])
    assert plain.has(rows, length, vocab)
    assert scaled.has(rows // 2, -(-length // 4), vocab)
    assert not any(scaled.has(count, length, vocab) for count in (rows, rows // 2))


@stages("retriever", "fusion")
def test_the_similarities_of_pairs_in_chunks(steps_of, stage):
    """40 pairs on 4 devices in 2 chunks."""
    plain, scaled = steps_of(stage)
    assert plain.has(40, 40)
    assert scaled.has(5, 40) and not any(scaled.has(rows, 40) for rows in (10, 40))


@stages("tokenizer", "copy_probe")
def test_the_batch_in_parts(steps_of, stage):
    name, kind = ("images", "ui8") if stage == "tokenizer" else ("tokens", "i32")
    plain, scaled = steps_of(stage)
    rows, *rest = scaled.batch[name].shape
    parts = (2, rows // 2, *rest)
    assert scaled.has(*parts, dtype=kind) and not plain.has(*parts, dtype=kind)


def test_a_manifest_holds_settings_under_the_names_of_older_ones():
    """So finished runs stay valid: a default adds nothing, and the mesh is where it has always been."""

    def recorded(stage, **scale):
        overrides = {f"{stage}.scale.{name}": value for name, value in scale.items()}
        config = chain_config.load(f"{PAGE}:{STAGES[stage]}", overrides)
        return chain_config.slice_of(chain_config.stage_configs(config)[stage])

    for stage in STAGES:
        plain = recorded(stage)
        assert "scale" not in plain and ("mesh" in plain) == (stage == "copy_probe")
    plain = recorded("copy_probe")
    assert plain["mesh"] == (1, 1, 1)
    given = recorded("copy_probe", mesh="2,1,1", dtype="bfloat16", remat="dots", num_parts="2")
    model = plain["model"] | {"dtype": "bfloat16", "remat": "dots"}
    assert given == plain | {"mesh": (2, 1, 1), "model": model, "scale": {"num_parts": 2}}
    assert recorded("retriever", dtype="bfloat16")["scale"] == {"dtype": "bfloat16"}


@pytest.mark.parametrize("key", renames.ABSENT)
def test_a_setting_that_means_nothing_to_a_stage_is_refused_with_the_reason(key):
    stage, _, _ = key.partition(".")
    page = f"{PAGE}:{STAGES[stage]}" if stage in STAGES else "configs/quickstart.py:tiny"
    with pytest.raises(UserError, match=f"no key '{key}': {renames.ABSENT[key]}"):
        chain_config.load(page, {key: "2"})


def test_a_batch_that_does_not_split_into_parts_is_refused_early(tmp_path, capfd):
    assert command(tmp_path / "run", "scenes", "tokenizer", num_parts=3) == 2
    says = capfd.readouterr().err
    assert "batch of 16 does not split over 1 devices in 3 parts" in says


def test_a_parameter_that_does_not_split_over_the_mesh_is_named(tmp_path, capfd):
    assert command(tmp_path / "run", "toy", "toy_pairs") == 0
    assert command(tmp_path / "run", "toy", "fusion", mesh="1,1,8") == 2
    says = capfd.readouterr().err
    assert "of shape" in says and "does not split over the mesh" in says
