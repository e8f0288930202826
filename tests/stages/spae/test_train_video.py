"""Stage `spae_video`: starts from an image tokenizer, trains on clips, and is measured beside it."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.models.spae import autoencoder
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.stages.shared import frozen, world_config
from rag_mm.stages.spae import train_video
from rag_mm.train import loop, optimizer

IMAGE = SPAEConfig(
    image_size=32,
    patch_size=8,
    encoder="patch",
    width=8,
    width_multipliers=(1,),
    num_res_blocks=0,
    embed_dim=8,
    codebook_size=32,
    levels=(1, 2, 4),
    codebook="language",
)
ADAM = optimizer.OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """An untrained image tokenizer."""
    folder = epath.Path(tmp_path_factory.mktemp("image"))
    make = lambda: autoencoder.SPAE(IMAGE, rngs=nnx.Rngs(0))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(make(), nnx.Param)[1]))()
    frozen.save_tokenizer(folder, IMAGE, None, params, tuple(f"w{i}" for i in range(32)))
    return folder


def make_config(folder, **changes):
    settings = dict(
        folder=str(folder),
        seed=0,
        world=world_config.EmojiWorld(class_share=0.02, seed=0),
        optimizer=ADAM,
        loop=loop.LoopConfig(2, log_every=1, checkpoint_every=10),
        time_stride=2,
        level_frames=(1, 2, 4),
        batch_size=4,
        num_eval=3,
    )
    return train_video.VideoStageConfig(**settings | changes)


def test_it_trains_from_the_image_tokenizer_and_codes_clips(image_folder, tmp_path):
    config, run = make_config(image_folder), run_folder.Run(tmp_path)
    metrics = train_video.run(config, run, tmp_path / "spae_video")
    assert metrics["num_codes"] == 1 + 2 * 4 + 4 * 16
    assert metrics["frame_by_frame"]["num_codes"] == 8 * 21
    assert metrics["level1"]["num_codes"] == 1
    folder = tmp_path / "spae_video" / train_video.FOLDER
    tokenizer = train_video.FrozenClips(folder)
    clips = train_video.eval_clips(config)
    assert (clips.shape, clips.dtype) == ((3, 8, 32, 32, 3), np.uint8)
    assert (clips[:, 0] != clips[:, -1]).any(axis=(1, 2, 3)).all()  # All of them move.
    stored = [safetensors.numpy.load_file(f / "params.safetensors") for f in (image_folder, folder)]
    np.testing.assert_array_equal(*(params["codebook"] for params in stored))  # It is of words.
    name = "decoder/stem/kernel"
    assert np.abs(stored[1][name][1] - stored[0][name]).max() > 0 and stored[1][name][0].any()
    codes = tokenizer.encode(clips)
    made = tokenizer.decode(codes).astype(np.float64)
    wanted = -10 * np.log10(np.square((made - clips) / 255).mean())
    assert metrics["psnr"] == pytest.approx(wanted, abs=0.01)
    assert (codes.shape, codes.dtype) == ((3, 73), np.int32)


def test_before_training_still_clips_are_the_image_tokenizers(image_folder, tmp_path):
    """A learning rate of almost zero leaves the inflated parameters as they are."""
    still = dataclasses.replace(ADAM, learning_rate=1e-12)
    config = make_config(image_folder, optimizer=still, inflation="average")
    train_video.run(config, run_folder.Run(tmp_path), tmp_path / "spae_video")
    tokenizer = train_video.FrozenClips(tmp_path / "spae_video" / train_video.FOLDER)
    image_tokenizer = frozen.FrozenTokenizer(image_folder)
    frames = train_video.eval_clips(config)[:, 0]
    made = tokenizer.decode(tokenizer.encode(np.repeat(frames[:, None], 8, axis=1)))
    wanted = image_tokenizer.decode(image_tokenizer.encode(frames)).astype(int)
    assert np.abs(made - wanted[:, None]).max() <= 1  # of 255, where rounding differs


def test_frames_alone_are_the_control(image_folder, tmp_path):
    """Untrained it is the image tokenizer, to the figure, at every level."""
    still = dataclasses.replace(ADAM, learning_rate=1e-12)
    alone = make_config(image_folder, optimizer=still, num_frames=1, time_stride=1, level_frames=())
    metrics = train_video.run(alone, run_folder.Run(tmp_path), tmp_path / "spae_video")
    for level in (metrics, *(metrics[f"level{number}"] for number in (1, 2, 3))):
        assert level["num_codes"] == level["frame_by_frame"]["num_codes"]
        assert level["psnr"] == pytest.approx(level["frame_by_frame"]["psnr"], abs=0.01)


def test_another_image_size_is_refused(image_folder):
    with pytest.raises(UserError, match="takes 16 pixels, the world's images have 32"):
        make_config(image_folder).clips_of(dataclasses.replace(IMAGE, image_size=16, patch_size=4))
    with pytest.raises(UserError, match="cannot be used"):
        make_config(image_folder.parent)
