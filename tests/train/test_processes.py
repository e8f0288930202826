"""Several processes train as one run: equal losses, one log, one checkpoint, and no waiting for dead ones."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import training_process

import rag_mm
from rag_mm.core import checksums, sharding
from rag_mm.train import checkpoint, preemption, watchdog

SCRIPT = pathlib.Path(training_process.__file__)
ROOT = pathlib.Path(rag_mm.__file__).parents[1]


def test_one_process_has_the_whole_batch():
    assert sharding.local_rows(8, sharding.make_mesh(2, 4, 1)) == range(8)


def test_the_shares_of_several_processes_are_the_batch_of_one():
    """Without overlap or loss, in any order of reading."""
    whole = training_process.make_batches()
    shares = [training_process.make_batches(range(*bounds)) for bounds in ((0, 3), (3, 4), (4, 8))]
    for _ in range(5):
        batch, parts = next(whole), [next(share) for share in shares]
        for name, rows in batch.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, rows)
    assert all(share.get_state() == whole.get_state() for share in shares)


def test_a_stop_request_is_agreed_on():
    """A single process stops at once; several would all stop one step later."""
    stop = preemption.Stop()
    agreement = preemption.Agreement(stop, sharding.make_mesh(2, 4, 1))
    assert not agreement.is_due()
    stop.is_requested = True
    assert agreement.is_due()


def test_a_watchdog_ends_with_its_body():
    with watchdog.within(0.2):
        pass
    time.sleep(0.4)


def start(folder, count, num_steps, what=""):
    """Starts the processes of one run, which connect at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"PYTHONPATH": path}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(me), str(count), str(port), str(num_steps), what],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr-{me}").open("w"),
        )
        for me in range(count)
    ]


def results(folder, count, num_steps):
    """The results of each process, after all exited with 0."""
    for me, process in enumerate(start(folder, count, num_steps)):
        code = process.wait(timeout=300)
        assert code == 0, (folder / f"stderr-{me}").read_text()[-3000:]
    return [json.loads((folder / f"result-{me}.json").read_text()) for me in range(count)]


def assert_same_losses(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "grad_norm"):
        found, wanted = ([row[name] for row in each] for each in (rows, expected))
        np.testing.assert_allclose(found, wanted, rtol=2e-6)


def params_on_one_device(folder):
    """The newest checkpoint as restored on a single device."""
    checkpoints = checkpoint.Checkpoints(folder / "run" / "checkpoints", 2)
    state = training_process.make_state(sharding.make_mesh())
    restored = checkpoints.restore(state, training_process.make_batches())
    checkpoints.close()
    assert len(restored.params["kernel"].sharding.device_set) == 1
    return jax.device_get(restored)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, results(folder, 1, 8)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, results(folder, 2, 8)


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(alone, pair):
    folder, seen = pair
    for each in seen:
        assert_same_losses(each["rows"], alone[1]["rows"])
    for step, records in alone[1]["order"].items():
        assert seen[0]["order"][step] + seen[1]["order"][step] == records
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


@pytest.mark.slow
def test_tokens_and_flops_of_all_processes_are_logged(alone, pair):
    """A step takes a second of the processes' clock, and record n of a batch has n % 11 tokens."""
    order = [alone[1]["order"][str(step)] for step in range(1, 9)]
    lengths = np.array(order).reshape(4, -1) % 11
    for folder in (alone[0], pair[0]):
        lines = (folder / "run" / "speed.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert [row["tokens_per_second"] for row in rows] == (lengths.sum(axis=1) / 2).tolist()
        flops = [row["model_flops_per_second"] for row in rows]
        assert flops == ((lengths**2).sum(axis=1) / 2).tolist()


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_one_on_one_device(alone, pair):
    checksums.check(pair[0] / "run" / "checkpoints" / "8")
    one, two = params_on_one_device(alone[0]), params_on_one_device(pair[0])
    assert one.step == two.step == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_sound_checkpoint(pair, tmp_path):
    """The damaged file is checked by one of them only."""
    shutil.copytree(pair[0], tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "run" / "checkpoints" / "8"
    stores = [path for path in damaged.rglob("d/*") if path.is_file()]
    path = max(stores, key=lambda store: store.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = results(tmp_path, 2, 8)
    assert [sorted(map(int, each["order"])) for each in again] == [[5, 6, 7, 8]] * 2
    for each, before in zip(again, pair[1], strict=True):
        assert each["rows"] == before["rows"]
    assert damaged.with_name("damaged-8").is_dir() and damaged.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_the_number_of_processes_may_change_on_resume(alone, tmp_path, counts):
    first, then = counts
    results(tmp_path, first, 4)
    seen = results(tmp_path, then, 8)
    for each in seen:
        assert_same_losses(each["rows"], alone[1]["rows"])
    for step in ("5", "6", "7", "8"):
        joined = [record for each in seen for record in each["order"][step]]
        assert joined == alone[1]["order"][step]


def wait_for(folder, at_least, running):
    """Waits until every process has reached that step."""
    deadline = time.monotonic() + 240
    for me, process in enumerate(running):
        path = folder / f"here-{me}"
        while not path.exists() or int(path.read_text() or 0) < at_least:
            assert process.poll() is None, (folder / f"stderr-{me}").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute(tmp_path, victim):
    running = start(tmp_path, 2, 10_000, "slow")
    wait_for(tmp_path, 3, running)
    running[victim].kill()
    began = time.monotonic()
    assert running[1 - victim].wait(timeout=120) != 0
    assert time.monotonic() - began < 60
    running[victim].wait()


@pytest.mark.slow
def test_a_process_stuck_in_its_input_prints_its_stack_and_all_end(tmp_path):
    running = start(tmp_path, 2, 8, "stuck")
    assert running[1].wait(timeout=240) == 1
    stderr = (tmp_path / "stderr-1").read_text()
    assert "Timeout" in stderr and "training_process.py" in stderr and "__next__" in stderr
    assert running[0].wait(timeout=60) != 0


@pytest.mark.slow
def test_all_save_the_same_step_if_one_receives_sigterm(alone, tmp_path):
    running = start(tmp_path, 2, 8, "slow")
    wait_for(tmp_path, 2, running)
    running[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in running] == [143, 143]
    folder = tmp_path / "run" / "checkpoints"
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert 2 <= newest < 8
    seen = results(tmp_path, 2, 8)
    assert_same_losses(seen[0]["rows"], alone[1]["rows"])
