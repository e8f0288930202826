"""Launch scripts set an environment and hand over to the command."""

import json
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_local_hands_over_with_the_flag_that_the_locked_jax_knows():
    if not (ROOT / ".venv" / "bin" / "rag-mm").exists():
        pytest.skip("the project is not installed in .venv")
    command = [ROOT / "launch" / "local.sh", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "xla_cpu_experimental_ynn_fusion_type" in json.dumps(json.loads(done.stdout))


def test_local_refuses_a_checkout_without_an_environment(tmp_path):
    script = tmp_path / "launch" / "local.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "launch" / "local.sh").read_text())
    done = subprocess.run(["bash", script, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "run make first" in done.stderr
