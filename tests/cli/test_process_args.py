"""Multi-process flags are checked; joined processes share the leader's broadcast and their shutdown."""

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

SCRIPT = pathlib.Path(__file__).parent / "programs" / "joined_process.py"


@pytest.mark.parametrize(
    ("address", "count", "process_id", "message"),
    [
        (None, 2, None, "--num-processes and --process-id must be given together"),
        (None, None, 1, "--num-processes and --process-id must be given together"),
        ("10.0.0.1:1234", None, None, "--num-processes and --process-id must be given together"),
        ("10.0.0.1:1234", 2, None, "--num-processes and --process-id must be given together"),
        ("10.0.0.1:1234", 2, 2, "--process-id=2 is out of range"),
        ("10.0.0.1:1234", 0, 0, "--num-processes=0; give at least 1"),
        ("10.0.0.1", 2, 0, "--coordinator=10.0.0.1 is not an address"),
        (":1234", 2, 0, "is not an address"),
        ("host:99999", 2, 0, "is not an address"),
        ("auto", 2, None, "--coordinator=auto detects"),
        ("auto", None, 0, "--coordinator=auto detects"),
    ],
)
def test_contradicting_arguments_are_refused(address, count, process_id, message):
    args = argparse.Namespace(coordinator=address, num_processes=count, process_id=process_id)
    with pytest.raises(UserError, match=message):
        process_args.check_arguments(args)


@pytest.mark.parametrize(
    "values", [(None, None, None), ("auto", None, None), ("[::1]:1234", 1, 0), ("a.b:1", 3, 2)]
)
def test_consistent_arguments_pass(values):
    names = ("coordinator", "num_processes", "process_id")
    process_args.check_arguments(argparse.Namespace(**dict(zip(names, values, strict=True))))


def start(folder, what):
    """Starts two processes that connect at a free port."""
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
    """Exit codes, and the seconds between the first and the last exit."""
    deadline, ends = time.monotonic() + timeout, {}
    while len(ends) < len(running):
        assert time.monotonic() < deadline
        ends |= {p: time.monotonic() for p in running if p not in ends and p.poll() is not None}
        time.sleep(0.05)
    return [p.returncode for p in running], max(ends.values()) - min(ends.values())


def test_a_user_error_in_the_leader_ends_all(tmp_path):
    exit_codes, seconds = codes(start(tmp_path, "mistake"))
    assert exit_codes == [2, 2] and seconds < 60
    lines = (tmp_path / "stderr-0").read_text().splitlines()
    assert lines[0].startswith("Process 0 of 2 connects to the others at 127.0.0.1:")
    assert lines[1:] == ["rag-mm: The page is wrong."]
    stderr = (tmp_path / "stderr-1").read_text()
    assert "rag-mm: process 0 has ended: The page is wrong." in stderr
    # Both received the leader's broadcast before that.
    assert [(tmp_path / f"here-{me}").read_text() for me in range(2)] == ["from 0", "from 0"]


def test_auto_detection_that_fails_is_reported(tmp_path):
    words = ["train", "--config=configs/quickstart.py:tiny", "--coordinator=auto"]
    done = subprocess.run(
        [sys.executable, "-m", "rag_mm", *words, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "jax cannot detect the other processes here" in done.stderr


@pytest.mark.slow
def test_a_bug_in_a_follower_ends_the_leader(tmp_path):
    exit_codes, seconds = codes(start(tmp_path, "bug"))
    assert exit_codes == [1, 1] and seconds < 60
    assert "KeyError" in (tmp_path / "stderr-1").read_text()
    assert "process 1 has ended" in (tmp_path / "stderr-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_one_ends_all_with_exit_code_143(tmp_path, which):
    running = start(tmp_path, "wait")
    while not all((tmp_path / f"here-{me}").exists() for me in range(2)):
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)
    running[which].send_signal(signal.SIGTERM)
    exit_codes, seconds = codes(running)
    assert exit_codes == [143, 143] and seconds < 60


@pytest.mark.slow
def test_all_exit_0_on_success(tmp_path):
    assert codes(start(tmp_path, "nothing"))[0] == [0, 0]
