"""Writers killed at random instants: each memory is what it was or was to become, and takes writes."""

import json
import pathlib

import fresh_python
import killed_changes
import pytest

pytestmark = pytest.mark.slow


def test_no_killed_change_leaves_a_state_that_nobody_wrote(tmp_path):
    """A process of its own, since changes are forked from one that has not started jax."""
    program = pathlib.Path(killed_changes.__file__)
    done = fresh_python.run(program, tmp_path / "kills", "--kills=36", "--seed=1")
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    summary = json.loads(done.stdout)
    assert (summary["kills"], summary["failures"]) == (36, [])
    counts = summary["outcomes"]
    assert all(sum(counts[name].values()) >= 3 for name in killed_changes.OPERATIONS)
    assert {name for of in counts.values() for name in of if of[name]} >= {"begun", "returned"}
    assert summary["resumed"] > 0
