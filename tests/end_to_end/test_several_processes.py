"""Two processes that share embedding and searching write the files of one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import PIL.Image
import pytest
from whole_run import contents

from rag_mm.cli import main
from rag_mm.stages.shared import world_config

SCRIPT = pathlib.Path(__file__).parent / "programs" / "neighbors_process.py"
TIMEOUT = 1200


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_all(commands: list[list[str]]) -> None:
    """Side by side, to the end of all; the first that fails is shown."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for words in commands
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=TIMEOUT)[1] for process in started]
        failed = [text for text, process in zip(told, started, strict=True) if process.returncode]
        assert not failed, failed[0][-3000:]
    finally:
        for process in started:
            process.kill()


@pytest.fixture
def images(tmp_path):
    """300 images, so that the second batch is not full, two of them bad."""
    source = world_config.EmojiWorld(class_share=0.02).scenes("memory", "common")
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(300):
        PIL.Image.fromarray(source.image(i)).save(folder / f"p{i}.png")
        lines.append(json.dumps({"image": f"p{i}.png", "caption": source.full_caption(i)}))
    lines[17], lines[280] = "{", lines[3]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_a_memory_of_two_processes_is_that_of_one(tiny_run, images, tmp_path):
    def build(out: str, *words: str) -> list[str]:
        program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
        shared = ["memory", "build", f"--documents={images}", f"--retriever={tiny_run.workdir}"]
        return [program, *shared, f"--out={tmp_path / out}", *words]

    meeting = [f"--coordinator={free_address()}", "--num-processes=2"]
    run_all([build("one")])
    run_all([build("two", *meeting, f"--process-id={number}") for number in range(2)])
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) > 10 and one == two
    (counts,) = (tmp_path / "two").glob("*/ingest.json")
    assert json.loads(counts.read_text())["added"] == 298


@pytest.mark.slow
def test_neighbors_of_two_processes_are_those_of_one(tiny_run, tmp_path):
    address, own = free_address(), tiny_run.workdir / "neighbors"
    outs = [tmp_path / str(number) for number in range(2)]
    for out in outs:
        out.mkdir()
    command = [sys.executable, str(SCRIPT), str(tiny_run.workdir)]
    run_all([[*command, str(out), address, "2", str(i)] for i, out in enumerate(outs)])
    assert list(outs[1].iterdir()) == []  # Process 0 alone writes.
    written = contents(outs[0])
    assert written == {name: digest for name, digest in contents(own).items() if name in written}
    assert {"train.npy", "policy.json", "held_out_text.npy"} <= set(written)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--num-processes=2"], "together"),
        (["--coordinator=127.0.0.1:1"], "together"),
        (["--coordinator=auto", "--process-id=1"], "leave them out"),
        (["--coordinator=a:1", "--num-processes=0", "--process-id=0"], "give at least 1"),
    ],
)
def test_mistakes(words, complaint, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shared = ["memory", "build", f"--retriever={tmp_path / 'run'}", f"--documents={tmp_path}"]
    assert main.main([*shared, f"--out={tmp_path / 'mem'}", *words]) == 2
    assert complaint in capsys.readouterr().err
