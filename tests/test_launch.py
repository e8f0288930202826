"""Launch scripts set the environment and run the command; `--dry-run` prints exactly that."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from rag_mm.cli import main

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
POD = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-256"}
JOIN = "--coordinator=auto"
# Arguments that a shell would split again if they were not quoted.
TRAIN = ["train", "--config=configs/quickstart.py:quick", "--workdir=runs/a b"]


def run(script, *words, **environment):
    for name in (
        "XLA_FLAGS",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "SLURM_SUBMIT_DIR",
        "SLURM_GPUS_PER_NODE",
        *POD,
    ):
        environment.setdefault(name, "")
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def printed(script, *words, **environment):
    """The arguments of the command that a dry run prints."""
    done = run(script, "--dry-run", *words, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def test_local_passes_a_flag_that_the_locked_jax_supports():
    if not (ROOT / ".venv" / "bin" / "rag-mm").exists():
        pytest.skip("the project is not installed in .venv")
    command = [LAUNCH / "local.sh", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "xla_cpu_experimental_ynn_fusion_type" in json.dumps(json.loads(done.stdout))


@pytest.mark.parametrize("script", ["local.sh", "gpu.sh"])
def test_a_checkout_without_an_environment_is_refused(tmp_path, script):
    copy = tmp_path / "launch" / script
    copy.parent.mkdir()
    copy.write_text((LAUNCH / script).read_text())
    done = subprocess.run(["bash", copy, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "run make first" in done.stderr


def test_local_and_gpu_print_the_environment_and_the_command():
    local, gpu = printed("local.sh", *TRAIN), printed("gpu.sh", *TRAIN)
    for words in (local, gpu):
        assert words[0] == "env" and words[-3:] == TRAIN
        assert words[-4].endswith(".venv/bin/rag-mm")
    assert any(word.startswith("XLA_FLAGS=--xla_cpu") for word in local)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in gpu
    # Variables set by the user win.
    words = printed("gpu.sh", *TRAIN, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", XLA_FLAGS="--a")
    assert words[1:3] == ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.5", "XLA_FLAGS=--a"]


def test_slurm_runs_the_gpu_script_once_per_node():
    words = printed("slurm.sbatch", *TRAIN, SLURM_SUBMIT_DIR="/shared/rag_mm")
    assert words[:3] == ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7", "srun"]
    assert words[-5:] == ["/shared/rag_mm/launch/gpu.sh", *TRAIN, JOIN]
    two = printed("slurm.sbatch", *TRAIN, SLURM_GPUS_PER_NODE="a100:2")
    assert two[1] == "JAX_LOCAL_DEVICE_IDS=0,1"
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --signal=TERM@" in text


GPUS = {
    "3": 3,
    "a100:8": 8,
    "h100:2,a100:1": 3,
    "a100:4(S:0-1)": 4,
    "a100:4(S:0,1),h100:1(S:1)": 5,
    "08": 8,
}


@pytest.mark.parametrize(("gpus", "count"), GPUS.items())
def test_slurms_ways_to_count_gpus(gpus, count):
    words = printed("slurm.sbatch", *TRAIN, SLURM_GPUS_PER_NODE=gpus)
    assert words[1] == "JAX_LOCAL_DEVICE_IDS=" + ",".join(map(str, range(count)))


@pytest.mark.parametrize(
    "gpus", ["HOME[$(touch {0})]", "$(touch {0})", "a[`touch {0}`]:1+1", "0", "x:"]
)
def test_what_is_no_number_of_gpus_is_refused_and_never_run(tmp_path, gpus):
    done = run("slurm.sbatch", "--dry-run", *TRAIN, SLURM_GPUS_PER_NODE=gpus.format(tmp_path / "x"))
    assert done.returncode == 2 and "GPU" in done.stderr and not (tmp_path / "x").exists()


HARD = ["a'b", "x\ny", "$(false)", "`false`", "", "é \\", "--config.a='b \"c\"'", "tail\n", "!*"]


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_any_posix_shell_of_a_worker_reads_the_same_words(tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    # Instead of `gcloud`, whose last argument is the command for the workers.
    (tmp_path / "gcloud").write_text("#!/bin/bash\nprintf '%s' \"${!#}\"\n")
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("tpu_pod.sh", "run", "caption", *HARD, **POD, PATH=path)
    _, command, remote = done.stdout.partition(".venv/bin/rag-mm ")
    assert command and not done.returncode
    script = f"""set -- {remote}; for word in "$@"; do printf '%s\\0' "$word"; done"""
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == ["caption", *HARD]


def test_an_operand_is_no_option():
    install = printed("tpu_pod.sh", "install", "--upload-pack=touch /tmp/x;'", **POD)
    remote = shlex.split(install[-1].removeprefix("--command="))
    assert remote[:5] == ["git", "clone", "--", "--upload-pack=touch /tmp/x;'", "rag_mm"]
    done = run("tpu_pod.sh", "--dry-run", "create", **POD | {"NAME": "--flags-file=x"})
    assert done.returncode == 2 and "begins like an option" in done.stderr


def test_a_pod_is_created_installed_used_and_deleted():
    create = printed("tpu_pod.sh", "create", **POD, SPOT="1")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-256", "--spot"} <= set(create)
    assert "--spot" not in printed("tpu_pod.sh", "create", **POD)
    install = printed("tpu_pod.sh", "install", "https://example.org/a b.git", **POD)
    remote = install[-1].removeprefix("--command=")
    words = ["git", "clone", "--", "https://example.org/a b.git", "rag_mm", "&&", "cd", "rag_mm"]
    assert shlex.split(remote) == [*words, "&&", "make", "tpu"]
    train = printed("tpu_pod.sh", "run", *TRAIN, **POD)
    assert "--worker=all" in train
    remote = train[-1].removeprefix("--command=")
    assert shlex.split(remote) == ["cd", "rag_mm", "&&", ".venv/bin/rag-mm", *TRAIN, JOIN]
    delete = printed("tpu_pod.sh", "delete", **POD)
    assert delete[3:6] == ["queued-resources", "delete", "pod"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_processes_join_for_multi_process_commands(script):
    verb, environment = (["run"], POD) if script == "tpu_pod.sh" else ([], {})

    def joins(*words):
        return JOIN in " ".join(printed(script, *verb, *words, **environment))

    assert joins("train", "--workdir=a") and joins("memory", "build", "--out=m")
    assert joins("corpus", "build", "--out=c") and joins("corpus", "neighbors", "c")
    assert not joins("corpus", "stats", "c") and not joins("generate", "corpus", "build")
    assert not joins("doctor") and not joins("memory", "search", "m")
    assert not joins("memory", "search", "build") and not joins("memory", "builder")
    # A value may hold the word.
    assert joins("train", "--workdir=runs/a--coordinator") and joins("train", "a --coordinator b")


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["run", "train"], {"NAME": "pod"}, "set ZONE first"),
        (["create"], {"NAME": "pod", "ZONE": "z"}, "set TYPE first"),
        (["grow"], {"NAME": "pod", "ZONE": "z"}, "launch/tpu_pod.sh create"),
        (["run"], {"NAME": "pod", "ZONE": "z"}, "launch/tpu_pod.sh create"),
        ([], {}, "launch/tpu_pod.sh create"),
    ],
)
def test_a_user_error_is_reported_and_runs_nothing(words, environment, says):
    done = run("tpu_pod.sh", *words, **environment, PATH=os.environ["PATH"])
    assert done.returncode == 2 and says in done.stderr and done.stdout == ""


def test_gke_runs_a_command_that_exists_on_every_host_of_a_slice():
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert job["kind"] == "JobSet"
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    a_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == int(sides[0]) * int(sides[1]) // a_host
    command = pod["containers"][0]["command"]
    assert command[0] == "rag-mm" and command[1] in main.COMMANDS and JOIN in command
    assert pod["containers"][0]["ports"][-1]["containerPort"] == int(
        cloud_tpu_cluster.coordinator_port
    )
    # Longer than the 30 s that a last checkpoint may take.
    assert pod["terminationGracePeriodSeconds"] > 30


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", LAUNCH / script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def _steps():
    """The commands of docs/training_at_scale.md that are started on a slice."""
    page = (ROOT / "docs" / "training_at_scale.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    start = "launch/tpu_pod.sh "
    return [line.removeprefix(start) for line in lines if line.startswith(f"{start}run ")]


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_each_step_from_tars_to_samples_can_be_started(script):
    """All processes share what takes long; the rest is started by one."""
    joining = {"corpus build", "memory build", "corpus neighbors"}
    started = set()
    for line in _steps():
        verb, *words = shlex.split(line)
        assert verb == "run"
        found = printed(script, *[verb] * (script == "tpu_pod.sh"), *words, **POD)
        name = words[0] if words[0] == "train" else " ".join(words[:2])
        started.add(name)
        assert (JOIN in " ".join(found)) == (name == "train" or name in joining)
    assert started == {"train", *joining}


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_a_given_coordinator_is_kept(script):
    coordinator = "--coordinator=10.0.0.1:8476"
    verb = ["run"] if script == "tpu_pod.sh" else []
    words = printed(script, *verb, *TRAIN, coordinator, NAME="pod", ZONE="a")
    assert coordinator in " ".join(words) and "--coordinator=auto" not in " ".join(words)
