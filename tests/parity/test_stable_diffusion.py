"""U-Net, autoencoder and samplers compute what diffusers' do, from random weights; 1.5 has its tensors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from rag_mm.convert import stable_diffusion_format, table, weights
from rag_mm.ops import diffusion

pytestmark = pytest.mark.parity
UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
    cross_attention_dim=12,
)
VAE = dict(
    sample_size=16,
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
)
SD15 = dict(
    unet=dict(sample_size=64, cross_attention_dim=5120, attention_head_dim=8),
    vae=dict(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ),
)


def theirs(kind, sizes):
    diffusers = pytest.importorskip("diffusers")
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    return classes[kind](**sizes)


def randomized(kind, sizes):
    """diffusers' model, with weights that hide no mistake."""
    import torch

    torch.manual_seed(0)
    model = theirs(kind, sizes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            size = weight[0].numel() if weight.ndim > 1 else 10
            weight.copy_(torch.randn(weight.shape) * size**-0.5 + float(weight.ndim == 1))
    return model


def loaded(kind, folder, model):
    """Our model with the weights of the folder that theirs writes."""
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    specs = stable_diffusion_format.open_folder(epath.Path(folder))
    family = {"unet": stable_diffusion_format.UNET, "vae": stable_diffusion_format.VAE}[kind]
    config = family.read_config(table.CheckpointFolder(values))
    assert family.read_config(table.CheckpointFolder(family.write_config(config))) == config
    graphdef, abstract = family.describe(config)
    params = weights.load_shards(weights.check_tensors(family, config, specs), specs, abstract)
    return nnx.merge(graphdef, params)


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_unet_predicts_what_diffusers_does(tmp_path):
    import torch

    model = randomized("unet", UNET)
    ours = loaded("unet", tmp_path / "unet", model)
    noisy, condition, time = (
        draw((2, 8, 8, 4), 0),
        draw((2, 3, 12), 1),
        np.array([7, 981], np.int32),
    )
    with torch.no_grad():
        expected = model(
            torch.tensor(noisy.transpose(0, 3, 1, 2)), torch.tensor(time), torch.tensor(condition)
        ).sample.numpy()
    found = jax.jit(lambda *a: ours(*a))(noisy, time, condition)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


def test_the_autoencoder_gives_diffusers_latents_and_images(tmp_path):
    import torch

    model = randomized("vae", VAE)
    ours = loaded("vae", tmp_path / "vae", model)
    images, latents = draw((2, 16, 16, 3), 0), draw((2, 8, 8, 4), 1)
    scale = model.config.scaling_factor
    with torch.no_grad():
        moments = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2)) / scale).sample
    encode = jax.jit(lambda x: (ours.encode(x), ours.encode(x, jax.random.key(0))))
    mean, sampled = encode(images)
    back = lambda x: x.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(mean, scale * back(moments.mean), atol=1e-4, rtol=1e-4)
    noise = jax.random.normal(jax.random.key(0), mean.shape)
    expected = scale * (back(moments.mean) + back(moments.std) * np.asarray(noise))
    np.testing.assert_allclose(sampled, expected, atol=1e-4, rtol=1e-4)
    found = jax.jit(lambda x: ours.decode(x))(latents)
    np.testing.assert_allclose(found, back(decoded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_every_tensor_of_15_has_its_place(kind):
    import torch

    with torch.device("meta"):
        model = theirs(kind, SD15[kind])
    family = {"unet": stable_diffusion_format.UNET, "vae": stable_diffusion_format.VAE}[kind]
    config = family.read_config(table.CheckpointFolder(json.loads(model.to_json_string())))
    found = {mapping.theirs: mapping.shape for mapping in family.mappings(config)}
    assert found == {name: tuple(value.shape) for name, value in model.state_dict().items()}


SCHEDULES = [
    diffusion.NoiseConfig(),
    diffusion.NoiseConfig("linear", first_beta=1e-4, last_beta=0.02, prediction="v", offset=0),
    diffusion.NoiseConfig("cosine", prediction="v", spacing="trailing", ends_at_image=True),
    diffusion.NoiseConfig.of_pixels(),
]


@pytest.mark.parametrize("method", diffusion.METHODS)
@pytest.mark.parametrize("config", SCHEDULES)
def test_samplers_take_diffusers_steps(config, method):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    c, predictions = config, {"epsilon": "epsilon", "v": "v_prediction", "image": "sample"}
    if method == "pndm" and c.clips:
        pytest.skip("diffusers' PNDM does not clip")
    how = dict(
        beta_start=c.first_beta,
        beta_end=c.last_beta,
        beta_schedule={"cosine": "squaredcos_cap_v2"}.get(c.kind, c.kind),
        prediction_type=predictions[c.prediction],
        timestep_spacing=c.spacing,
        steps_offset=c.offset,
        set_alpha_to_one=c.ends_at_image,
    )
    if method == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=c.clips, **how)
    else:
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **how)
    shares = diffusion.image_shares(c)
    np.testing.assert_allclose(shares, scheduler.alphas_cumprod.numpy(), rtol=2e-4)
    scheduler.set_timesteps(10)
    plan = diffusion.make_plan(c, method, 10)
    np.testing.assert_array_equal(plan.at, scheduler.timesteps.numpy())
    # A prediction that depends on image and step, and stays of size 1.
    answer = lambda np_, x, t: np_.sin(1.5 * x + 0.01 * t)
    x = torch.tensor(draw((2, 3, 3, 1), 0))
    for calls, t in enumerate(scheduler.timesteps, 1):
        extra = dict(use_clipped_model_output=True) if method == "ddim" else {}
        x = scheduler.step(answer(torch, x, t), t, x, **extra).prev_sample
        part = diffusion.Plan(*(rows[:calls] for rows in plan))
        predict = lambda y, step: answer(jnp, y, step.astype(jnp.float32))
        found = diffusion.sample(predict, jnp.asarray(draw((2, 3, 3, 1), 0)), c, part)
        # Theirs of PNDM adds numbers of some thousands at a share of 1e-9: float32 keeps three digits.
        bound = 1e-3 if c.kind == "cosine" and method == "pndm" else 1e-4
        bound *= max(1.0, float(x.abs().max()))
        np.testing.assert_allclose(found, x.numpy(), atol=bound, err_msg=f"call {calls}")
