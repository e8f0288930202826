"""RECO on documents by its command: two processes make the run of one, and go on where they were killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from whole_run import contents, fingerprints

from rag_mm.cli import main
from rag_mm.worlds.emoji import emoji_scenes

pytestmark = pytest.mark.slow
NUM_DEVICES, TIMEOUT, COUNT = 4, 900, 70
SETTINGS = {
    "document_pairs.shard_size": 16,
    "document_pairs.embed_batch": 8,
    "fusion.model.num_heads": 4,
    "fusion.batch_size": 16,
    "fusion.loop.num_steps": 40,
    "fusion.loop.log_every": 2,
    "fusion.loop.checkpoint_every": 4,
    "fusion.optimizer.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> pathlib.Path:
    """Scenes with captions, one of them without an image."""
    folder = tmp_path_factory.mktemp("documents")
    source = emoji_scenes.open_documents("easy/common/test")
    lines = [{"image": f"{row}.png", "caption": source.full_caption(row)} for row in range(COUNT)]
    for row in range(COUNT):
        PIL.Image.fromarray(source.image(row)).save(folder / f"{row}.png")
    (folder / "20.png").unlink()
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def memory(tiny_run, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("memory") / "mem"
    words = ["--documents=scenes:easy/common/memory", f"--retriever={tiny_run.workdir}"]
    assert main.main(["memory", "build", *words, f"--out={out}", "--index=exact"]) == 0
    return out


@pytest.fixture(scope="module")
def start(documents, memory):
    """Starts the processes of a run, on four simulated devices in all."""

    def call(workdir: pathlib.Path, count: int) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        values = SETTINGS | {"document_pairs.documents": documents, "document_pairs.memory": memory}
        program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
        words = [f"--config.{name}={value}" for name, value in values.items()]
        command = [program, "train", "--config=configs/reco.py:clip_l14", f"--workdir={workdir}"]
        flags = f"--xla_force_host_platform_device_count={NUM_DEVICES // count}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        running = []
        for number in range(count):
            meeting = [f"--coordinator={address}", f"--num-processes={count}"]
            own = [*meeting, f"--process-id={number}"] if count > 1 else []
            log = workdir.with_name(f"{workdir.name}-{number}.log").open("w")
            running.append(
                subprocess.Popen([*command, *words, *own], env=env, stdout=log, stderr=log)
            )
        return running

    return call


@pytest.fixture(scope="module")
def finish(start):
    """Runs to the end of all processes."""

    def call(workdir: pathlib.Path, count: int) -> pathlib.Path:
        running = start(workdir, count)
        try:
            for number, process in enumerate(running):
                log = workdir.with_name(f"{workdir.name}-{number}.log")
                assert process.wait(timeout=TIMEOUT) == 0, log.read_text()[-3000:]
        finally:
            for process in running:
                process.kill()
        return workdir

    return call


@pytest.fixture(scope="module")
def alone(finish, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.fixture(scope="module")
def pair(finish, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("pair") / "run", 2)


def log(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "fusion/log.jsonl").read_text().splitlines()]


def test_two_processes_embed_and_search_as_one_does(alone, pair):
    for folder in ("document_pairs/train", "fusion/neighbors"):
        one, two = contents(alone / folder), contents(pair / folder)
        assert len(one) > 10 and one == two


def test_two_processes_train_as_one_does(alone, pair):
    one, two = log(alone), log(pair)
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) == 20
    for name in ("loss", "grad_norm", "refined_refined"):
        found, wanted = ([row[name] for row in each] for each in (two, one))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_run_killed_at_random_ends_with_the_same_bits(start, finish, pair, tmp_path):
    """All processes, while the documents are embedded and while the fusion is trained."""
    workdir = tmp_path / "run"
    for place in ("document_pairs/train/shards/commit-*", "fusion/checkpoints/[0-9]*[0-9]"):
        running, deadline = start(workdir, 2), time.monotonic() + TIMEOUT
        try:
            while not any(workdir.glob(place)) and time.monotonic() < deadline:
                assert all(process.poll() is None for process in running)
                time.sleep(0.01)
        finally:
            for process in running:
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert json.loads((workdir / "fusion/manifest.json").read_text())["status"] == "running"
    finish(workdir, 2)
    assert fingerprints(workdir) == fingerprints(pair)
    assert log(workdir) == log(pair)
