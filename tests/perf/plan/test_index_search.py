"""A memory of a billion rows, compiled by the TPU's own compiler on this CPU."""

import json
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "rag_mm", "plan", "--json"]


def run(*words, timeout=300):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False, timeout=timeout
    )


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "num_chips"), [("v5e:16x16", 256), ("v5e:2x2", 4)])
def test_a_billion_rows_fit_into_a_pod_and_not_into_four_chips(topology, num_chips):
    pytest.importorskip("libtpu")
    done = run("--memory=1000000000x512", f"--topology={topology}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["num_chips"] == num_chips and found["fits"] == (num_chips == 256)
    if not found["fits"]:
        assert found["over_bytes"] > 100 << 30
        return
    # Half a million bytes over the rows, the mask and the queries themselves.
    least = found["rows_per_chip"] * (2 * 512 + 1)
    assert least <= found["peak_bytes"] < 1.01 * least < found["hbm_bytes"]
    # Only hits move: one exchange of ids and one of scores, which the compiler may join.
    moved = {kind: count for kind, count in found["collectives"].items() if count}
    assert 1 <= sum(moved.values()) <= 2 and set(moved) <= {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory=1000"], "is not ROWSxDIM"),
        (["--memory=0x512"], "is not ROWSxDIM"),
        (["--memory=1000x512", "--config=configs/cm3leon.py:7b"], "not allowed with"),
        ([], "required"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, message):
    done = run(*words, "--topology=v5e:2x2", timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
