"""The command as users start it, and what two runs of the same bits have in common."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rag_mm.core import files

TIMEOUT = 900
# Training stages: killed where a checkpoint lies behind them and steps before them.
TRAINED = ("tokenizer", "retriever", "decoder", "control")
# What shows that a stage has done some of its work, so that a kill leaves it half done.
EVIDENCE = dict.fromkeys(TRAINED, "checkpoints/[0-9]*[0-9]") | {
    "memory": "CURRENT",
    "neighbors": "train.npy",
    "generation": "*_codes.npy",
    "evaluation": "times.json",
    "report": "figures/*.png",
}
# Of the figures under `quickstart`, those that two runs of the same bits need not share.
COSTS = (
    "wall_seconds", "peak_rss_gib", "borrowed_seconds", "retrieval_ms", "generation_ms",
    "retrieval_share",
)  # fmt: skip


class Quickstart:
    """`rag-mm quickstart:tiny` on one folder, in processes of its own."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir

    def run(self, *words: str) -> subprocess.CompletedProcess:
        """Runs it to its end."""
        command = self._command(*words)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)

    def kill_inside(self, stage: str) -> str:
        """Runs it until it is inside a stage, ends it and all its children at once; its stderr."""
        log = self.workdir.with_name(f"{stage}.log")
        with log.open("w") as stderr:
            process = subprocess.Popen(
                self._command(), stdout=stderr, stderr=stderr, start_new_session=True
            )
            try:
                self._wait(process, stage)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return log.read_text()

    def status(self, stage: str) -> str:
        """`running`, `done`, or nothing where the stage was never begun."""
        path = self.workdir / stage / "manifest.json"
        return json.loads(path.read_text())["status"] if path.exists() else ""

    def _wait(self, process: subprocess.Popen, stage: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            is_inside = self.status(stage) == "running"
            if is_inside and any((self.workdir / stage).glob(EVIDENCE[stage])):
                return
            time.sleep(0.01)
        pytest.fail(f"it never came inside {stage}")

    def _command(self, *words: str) -> list[str]:
        program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
        config = "--config=configs/quickstart.py:tiny"
        return [program, "quickstart", config, f"--workdir={self.workdir}", *words]


def metrics(workdir: pathlib.Path) -> dict:
    """What two runs of the same bits share: not their times, memory and machine."""
    measured = files.read_json(workdir / "metrics.json")
    measured.pop("machine")
    measured["quickstart"] = {k: v for k, v in measured["quickstart"].items() if k not in COSTS}
    return measured


def fingerprints(workdir: pathlib.Path) -> dict[str, str]:
    """The fingerprint of every finished stage."""
    manifests = {p.parent.name: files.read_json(p) for p in workdir.glob("*/manifest.json")}
    return {stage: manifest["fingerprint"] for stage, manifest in manifests.items()}


def contents(workdir: pathlib.Path) -> dict[str, str]:
    """Digest of every file, by path."""
    paths = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    return {str(path.relative_to(workdir)): files.file_digest(path) for path in paths}
