"""`rag-mm plan` with the real TPU compiler: two layers, golden collective counts, and a program too large.

Counts are those of the locked libtpu (0.0.42); another version may fuse or split collectives. Needs [tpu].
"""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu")

SMALL = (
    "model.num_layers=2",
    "model.embed_dim=1024",
    "model.num_heads=8",
    "model.mlp_dim=4096",
    "sequences.max_seq_len=1024",
    "scale.loss_chunks=4",
)
# The same for the full 7B on v5e:16x16: layers and chips change how often each runs, not their number.
GOLDEN = {
    "all-gather": 37,
    "all-reduce": 4,
    "reduce-scatter": 13,
    "all-to-all": 0,
    "collective-permute": 0,
}


def plan(*options, config="configs/cm3leon.py:7b"):
    command = [
        pathlib.Path(sys.executable).with_name("rag-mm"),
        "plan",
        "--json",
        f"--config={config}",
    ]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def small(*options):
    return plan(*(f"--config.pretraining.{value}" for value in SMALL), *options)


def test_gradients_are_reduce_scattered_and_the_state_is_donated():
    found = small("--topology=v5e:4x4", "--batch=64")
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    # Weights and both moments, a sixteenth of each, are updated in place.
    share = 3 * 4 * found["num_params"] / 16
    assert share <= found["alias_bytes"] < 1.01 * share + 4096
    assert found["argument_bytes"] < 1.2 * found["alias_bytes"] + (1 << 20)
    assert 0 < found["peak_bytes"] < found["hbm_bytes"]
    assert found["collectives"] == GOLDEN
    # Fewer bytes are all-reduced than reduce-scattered.
    assert found["collective_bytes"]["all-reduce"] < found["collective_bytes"]["reduce-scatter"]


def test_a_program_that_is_too_large_is_reported_without_an_error():
    found = plan("--topology=v5e:2x2", "--batch=512", "--config.pretraining.model.num_layers=2")
    assert not found["fits"]
    assert found["over_bytes"] == found["peak_bytes"] - found["hbm_bytes"] > 0
    assert found["hbm_bytes"] == int(15.75 * (1 << 30))


def test_decoding_compiles_for_a_split_over_heads():
    found = small("--topology=v5e:2x2", "--decode=64")
    assert found["program"] == "decode" and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 4}
    assert found["fits"] and found["seconds"]["hbm"] > found["seconds"]["compute"]


def test_two_slices_all_reduce_gradients():
    found = small("--topology=v5e:2x2", "--slices=2", "--batch=16")
    assert found["num_chips"] == 8 and found["mesh"]["data"] == 2
    assert found["fits"] and found["seconds"]["dcn"] > 0
