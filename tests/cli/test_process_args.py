"""Processes that join share their arguments' checks, the first one's words, and their end."""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from rag_mm.cli import process_args
from rag_mm.core.errors import UserError

SCRIPT = pathlib.Path(__file__).with_name("joined_process.py")


@pytest.mark.parametrize(
    ("address", "count", "number", "complaint"),
    [
        (None, 2, None, "--num-processes and --process-id go together"),
        (None, None, 1, "--num-processes and --process-id go together"),
        ("10.0.0.1:1234", None, None, "--num-processes and --process-id go together"),
        ("10.0.0.1:1234", 2, None, "--num-processes and --process-id go together"),
        ("10.0.0.1:1234", 2, 2, "--process-id=2 is none of --num-processes=2"),
        ("10.0.0.1:1234", 0, 0, "count from 0"),
        ("10.0.0.1", 2, 0, "--coordinator=10.0.0.1 is no place to meet"),
        (":1234", 2, 0, "is no place to meet"),
        ("host:99999", 2, 0, "is no place to meet"),
        ("auto", 2, None, "--coordinator=auto finds"),
        ("auto", None, 0, "--coordinator=auto finds"),
    ],
)
def test_arguments_that_contradict_one_another(address, count, number, complaint):
    args = argparse.Namespace(coordinator=address, num_processes=count, process_id=number)
    with pytest.raises(UserError, match=complaint):
        process_args.check_arguments(args)


@pytest.mark.parametrize(
    "given", [(None, None, None), ("auto", None, None), ("[::1]:1234", 1, 0), ("a.b:1", 3, 2)]
)
def test_arguments_that_agree(given):
    names = ("coordinator", "num_processes", "process_id")
    process_args.check_arguments(argparse.Namespace(**dict(zip(names, given, strict=True))))


def start(folder, what):
    """Two processes, which find one another at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, address, "2", str(me), what, folder],
            env=env,
            stderr=(folder / f"stderr-{me}").open("w"),
        )
        for me in range(2)
    ]


def codes(running, timeout=240):
    """Exit codes, and seconds from the first end to the last."""
    deadline, ends = time.monotonic() + timeout, {}
    while len(ends) < len(running):
        assert time.monotonic() < deadline
        ends |= {p: time.monotonic() for p in running if p not in ends and p.poll() is not None}
        time.sleep(0.05)
    return [p.returncode for p in running], max(ends.values()) - min(ends.values())


def test_a_mistake_of_the_first_is_the_end_of_all(tmp_path):
    found, seconds = codes(start(tmp_path, "mistake"))
    assert found == [2, 2] and seconds < 60
    said = (tmp_path / "stderr-0").read_text().splitlines()
    assert said[0].startswith("Process 0 of 2 meets the others at 127.0.0.1:")
    assert said[1:] == ["rag-mm: The page is wrong."]
    told = (tmp_path / "stderr-1").read_text()
    assert "rag-mm: process 0 has ended: The page is wrong." in told
    # Both heard the first one's word before.
    assert [(tmp_path / f"here-{me}").read_text() for me in range(2)] == ["from 0", "from 0"]


def test_where_jax_finds_nobody_that_is_said(tmp_path):
    code = "from rag_mm.cli import main; raise SystemExit(main.main())"
    words = ["train", "--config=configs/quickstart.py:tiny", "--coordinator=auto"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "jax does not find the other processes by itself here" in done.stderr


@pytest.mark.slow
def test_a_bug_in_another_is_the_end_of_the_first(tmp_path):
    found, seconds = codes(start(tmp_path, "bug"))
    assert found == [1, 1] and seconds < 60
    assert "KeyError" in (tmp_path / "stderr-1").read_text()
    assert "process 1 has ended" in (tmp_path / "stderr-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_all_end_with_the_code_of_a_stop_where_one_is_told_to(tmp_path, which):
    running = start(tmp_path, "wait")
    while not all((tmp_path / f"here-{me}").exists() for me in range(2)):
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)
    running[which].send_signal(signal.SIGTERM)
    found, seconds = codes(running)
    assert found == [143, 143] and seconds < 60


@pytest.mark.slow
def test_all_end_well_together(tmp_path):
    assert codes(start(tmp_path, "nothing"))[0] == [0, 0]
