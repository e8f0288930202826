"""A finished run's decoder is adapted by LoRA in another run: by commands, and loaded and exported merged."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import rag_mm
from rag_mm.cli import main
from rag_mm.core import files
from rag_mm.nn import param_trees
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import train_tokenizer


def leaves_of(workdir):
    image_tokenizer = train_tokenizer.load_tokenizer(workdir)
    generator = train_decoder.load_params(workdir / "decoder", image_tokenizer)
    return param_trees.leaves_by_path(jax.device_get(generator.params))


@pytest.mark.slow
def test_a_decoder_is_adapted_loaded_and_exported(finished, tiny_run, tmp_path, capsys):
    base = leaves_of(tiny_run.workdir)
    command = [
        "train",
        "--config=configs/quickstart.py:tiny",
        f"--workdir={finished}",
        "--stage=decoder",
        f"--config.decoder.start_from={tiny_run.workdir}",
        "--config.decoder.loop.num_steps=20",
        "--config.decoder.optimizer.warmup_steps=2",
    ]
    lora = '--config.decoder.lora={"rank": 2, "targets": ["q", "down"]}'
    assert main.main([*command, lora, "--overwrite"]) == 0
    adapted = leaves_of(finished)
    changed = {name for name in base if not np.array_equal(base[name], adapted[name])}
    assert base.keys() == adapted.keys()
    assert changed == {"stack/blocks/attention/q/kernel", "stack/blocks/mlp/down/kernel"}
    losses = [row["loss"] for row in map(files.json.loads, (finished / "decoder/log.jsonl").open())]
    plain = [
        row["loss"]
        for row in map(files.json.loads, (tiny_run.workdir / "decoder/log.jsonl").open())
    ]
    assert losses[0] < plain[0]  # It goes on where the other one ended.

    assert rag_mm.load(finished).generate("a red apple", num=1)
    out = tmp_path / "exported"
    assert main.main(["export", "cm3", str(finished), str(out)]) == 0
    (file,) = out.glob("*.safetensors")
    exported = safetensors.numpy.load_file(file)
    names = [name for name in exported if name.endswith("down.kernel") and ".0." in name]
    np.testing.assert_array_equal(exported[names[0]], adapted["stack/blocks/mlp/down/kernel"][0])

    capsys.readouterr()
    assert main.main([*command, lora.replace("2", "3")]) == 2
    assert "(lora.rank was 2, now 3)" in capsys.readouterr().err
