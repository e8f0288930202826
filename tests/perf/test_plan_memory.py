"""A memory of a billion rows, compiled by the TPU's own compiler on this CPU."""

import json
import subprocess
import sys

import pytest

from rag_mm.core.errors import UserError
from rag_mm.perf import plan_memory

CODE = """
from rag_mm.perf import plan_memory
plan_memory.set_environment()
import json, sys
print(json.dumps([plan_memory.plan(10**9, 512, topology) for topology in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_billion_rows_fit_into_a_pod_and_not_into_four_chips():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", CODE, "v5e:16x16", "v5e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, small = json.loads(done.stdout)
    assert found["fits"] and found["num_chips"] == 256
    # Half a million bytes over the rows, the mask and the queries themselves.
    least = found["rows_per_chip"] * (2 * 512 + 1)
    assert least <= found["peak_bytes"] < 1.01 * least
    # Only hits move: one exchange of ids and one of scores, which the compiler may join.
    assert 1 <= sum(found["collectives"].values()) <= 2
    assert set(found["collectives"]) <= {"all-gather", "all-reduce"}
    assert not small["fits"] and "reason" in small


@pytest.mark.parametrize("topology", ["v5e", "v5e:3by3", "h100:2x2"])
def test_a_topology_that_there_is_not(topology):
    with pytest.raises(UserError, match="no topology"):
        plan_memory.plan(10, 8, topology)
