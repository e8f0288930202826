"""The added losses in training: what trains what, the moving averages of logits, and the frozen tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.models.spae import added_terms, autoencoder, discriminator
from rag_mm.models.spae.loss_weights import LossWeights
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.nn import param_trees
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize
from rag_mm.stages import training
from rag_mm.stages.spae import added_losses
from rag_mm.train import loop, optimizer

MODEL = SPAEConfig(
    image_size=16,
    patch_size=4,
    encoder="patch",
    width=8,
    width_multipliers=(1,),
    num_res_blocks=0,
    embed_dim=8,
    codebook_size=16,
    levels=(4,),
)
ADAM = optimizer.OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant")
SIZES = discriminator.DiscriminatorConfig(width=4, width_multipliers=(2,))
IMAGES = np.random.default_rng(0).integers(256, size=(8, 16, 16, 3)).astype(np.uint8)
DECAY = 0.9


def make_model():
    return autoencoder.SPAE(MODEL, rngs=nnx.Rngs(params=0))


def reconstruct(model, batch, rng):
    del rng
    images = image_ops.to_float(batch["images"])
    grids = MODEL.grids_at(16, 16)
    z = model.embed(images)
    averages = quantize.running_averages(
        quantize.quantize(z, model.codebook[...], grids), model.codebook[...], grids
    )
    return images, model.render(quantize.straight_through(z, averages[-1], grids))


def make_config(**weights):
    return added_losses.AddedLossesConfig(
        weights=LossWeights(**weights), discriminator=SIZES, optimizer=ADAM, lecam_decay=DECAY
    )


def train(folder, num_steps, mesh=(1, 1, 1), **weights):
    config = make_config(**weights)

    @sharding.automatic()
    def loss_fn(model, batch, rng):
        images, made = reconstruct(model, batch, rng)
        added, metrics = added_terms.added_terms(model, images, made, config.weights)
        loss, count = jnp.mean((made - images) ** 2) + added, jnp.float32(len(images))
        return loss, {"loss": (loss * count, count)} | metrics

    batches = pipeline.make_batches(IMAGES, 8, 0, lambda image, rng: {"images": image})
    return training.train(
        "toy",
        folder,
        added_losses.extend(config, make_model, 16, None, 0),
        loss_fn,
        batches,
        optimizer_config=ADAM,
        loop_config=loop.LoopConfig(num_steps, log_every=1, checkpoint_every=100),
        seed=0,
        mesh=sharding.make_mesh(*mesh),
        what=added_losses.what_trains(config, reconstruct),
    )


FULL = dict(adversarial=0.1, r1=1.0, lecam=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("full"), 3, **FULL)


def test_the_averages_follow_the_mean_logits_by_their_decay(trained):
    params, log = trained
    for kind in ("real", "fake"):
        average = 0.0
        for entry in log:
            average = DECAY * average + (1 - DECAY) * entry[f"discriminator/{kind}_logit"]
        np.testing.assert_allclose(params["logit_averages"][kind], average, rtol=1e-4)
        assert average != 0


def test_all_parts_train_and_the_tokenizers_own_are_told_apart(trained):
    params, log = trained
    made = added_losses.extend(make_config(**FULL), make_model, 16, None, 0)
    before = param_trees.leaves_by_path(nnx.to_pure_dict(nnx.split(made(), nnx.Param)[1]))
    after = param_trees.leaves_by_path(params)
    assert before.keys() == after.keys()
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same <= {"codebook"}  # This loss has no term of its own for the codebook.
    plain = nnx.to_pure_dict(nnx.split(jax.eval_shape(make_model), nnx.Param)[1])
    assert jax.tree.structure(added_losses.own(params)) == jax.tree.structure(plain)
    assert {"adversarial", "discriminator/r1", "discriminator/lecam"} <= log[-1].keys()


@pytest.mark.slow
def test_the_logits_are_computed_once():
    """The third loss costs next to nothing, as it shares the forward pass of the second."""
    batch = {"images": jnp.asarray(IMAGES)}

    def cost(names):
        config = make_config(**FULL)
        graphdef, params = nnx.split(
            added_losses.extend(config, make_model, 16, None, 0)(), nnx.Param
        )
        losses = added_losses.what_trains(config, reconstruct).further_losses

        def step(params):
            def grad(name):
                run = lambda params: losses[name].loss_fn(
                    nnx.merge(graphdef, params), batch, jax.random.key(0)
                )[0]
                return jax.grad(run)(params)

            return [grad(name) for name in names]

        compiled = (
            jax.jit(step)
            .lower(params)
            .compile(
                {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
            )
        )
        return compiled.cost_analysis()["flops"]

    alone = cost(["discriminator"])
    assert cost(["discriminator", "logit_averages"]) < 1.05 * alone


def test_without_weights_the_model_and_its_training_are_the_plain_ones():
    config = added_losses.AddedLossesConfig()
    assert added_losses.extend(config, make_model, 16, None, 0) is make_model
    assert not added_losses.what_trains(config, reconstruct).further_losses
    assert added_losses.start(config, None, {}) == {}
    assert not config.needs_retriever


@pytest.mark.slow
def test_devices_change_nothing_but_rounding(tmp_path, trained):
    _, log = train(tmp_path, 3, (2, 2, 1), **FULL)
    for here, there in zip(log, trained[1], strict=True):
        for name in ("loss", "grad_norm", "discriminator/loss", "discriminator/grad_norm"):
            assert here[name] == pytest.approx(there[name], rel=2e-3), name


def test_a_tower_that_is_none_is_refused(tmp_path):
    file = tmp_path / "vgg.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be used: .*not a safetensors file"):
        added_losses.AddedLossesConfig(folder=str(file))
    with pytest.raises(UserError, match="cannot be used"):
        added_losses.AddedLossesConfig(folder=str(tmp_path))


def test_the_runs_retriever_becomes_the_frozen_tower(tiny_run):
    folder = epath.Path(tiny_run.workdir) / "retriever" / "frozen"
    config = make_config(perceptual=0.1)
    assert config.needs_retriever
    make = added_losses.extend(config, make_model, 16, folder, 0)
    _, abstract = param_trees.describe(make, sharding.make_mesh())
    given = param_trees.leaves_by_path(added_losses.start(config, folder, abstract))
    stored = safetensors.numpy.load_file(folder / "params.safetensors")
    assert {path.removeprefix("perceptual/") for path in given} == {
        path for path in stored if path.startswith("vision/")
    }
    for path, value in given.items():
        np.testing.assert_array_equal(value, stored[path.removeprefix("perceptual/")])
        assert added_losses.what_trains(config, reconstruct).is_frozen(path)
