"""One `rag-mm train` that is killed in every phase, beside one that is not.

    python tests/end_to_end/killed_train.py FOLDER --kills=40

runs both in FOLDER, which must not exist, and prints what they have in common and what the kills cost, as
JSON. Each kill is a process of its own; every process goes on where the one before died.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE / "programs"))

import killed_command  # noqa: E402
import killed_page  # noqa: E402
import whole_run  # noqa: E402

TIMEOUT = 900
PROGRAM = HERE / "programs" / "killed_command.py"
# While a stage trains, after it and once it is done: a stage reaches the later ones no more than once.
TRAINING = tuple(killed_command.PHASES)[:5]
LATER = tuple(killed_command.PHASES)[5:]


def plan(num_kills: int) -> list[tuple[str, str]]:
    """Stage and phase of each kill: as many in each phase, shared out among the stages that train.

    Args:
        num_kills: a multiple of the number of phases.
    """
    rounds, rest = divmod(num_kills, len(killed_command.PHASES))
    if rest or rounds < 1:
        raise ValueError(f"give a multiple of {len(killed_command.PHASES)} kills, not {num_kills}")
    kills = []
    for place, stage in enumerate(killed_page.TRAINED):
        count = (rounds + len(killed_page.TRAINED) - 1 - place) // len(killed_page.TRAINED)
        kills += [(stage, phase) for _ in range(count) for phase in TRAINING]
        kills += [(stage, phase) for phase in LATER for _ in range(count)]
    return kills


def words(workdir: pathlib.Path, preset: str = "all") -> list[str]:
    """The command that trains the page in a folder, without its program."""
    return ["train", f"--config={HERE / 'killed_page.py'}:{preset}", f"--workdir={workdir}"]


def start(workdir: pathlib.Path, preset: str) -> subprocess.Popen:
    """Starts the command; what it says is added to a log beside the folder."""
    program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
    with workdir.with_suffix(".log").open("a") as file:
        return subprocess.Popen([program, *words(workdir, preset)], stdout=file, stderr=file)


def train(workdir: pathlib.Path, preset: str = "all") -> float:
    """Runs the command to its end; its seconds."""
    began = time.monotonic()
    code = start(workdir, preset).wait(TIMEOUT)
    assert code == 0, workdir.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - began


def kill(workdir: pathlib.Path, stage: str, phase: str, seed: int) -> float:
    """Runs the command until it dies inside a phase; its seconds."""
    log = workdir.with_suffix(".log")
    command = [sys.executable, str(PROGRAM), stage, phase, str(seed), *words(workdir)]
    began = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False, timeout=TIMEOUT)
    seconds, code = time.monotonic() - began, done.returncode
    assert code == -signal.SIGKILL, f"{stage}, {phase}: {code}\n{log.read_text()[-3000:]}"
    return seconds


def outcome(workdir: pathlib.Path) -> dict:
    """What an interruption must leave as it is: fingerprints, digests, logs and the files there are."""
    return {
        "fingerprints": whole_run.fingerprints(workdir),
        "outputs": {
            path.parent.name: json.loads(path.read_text())["outputs"]
            for path in sorted(workdir.glob("*/manifest.json"))
        },
        "metrics": {
            name: value
            for name, value in json.loads((workdir / "metrics.json").read_text()).items()
            if name != "machine"
        },
        "logs": {path.parent.name: path.read_text() for path in workdir.glob("*/log.jsonl")},
        "checkpoints": sorted(
            str(path.relative_to(workdir)) for path in workdir.glob("*/checkpoints/*")
        ),
    }


def step_seconds(workdir: pathlib.Path) -> float:
    """Seconds of all steps of a run at the median time of its stage: what is useful of its time."""
    total = 0.0
    for path in sorted(workdir.glob("*/speed.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        total += rows[-1]["step"] * statistics.median(row["step_seconds_p50"] for row in rows)
    return total


def compare(folder: pathlib.Path, num_kills: int) -> dict:
    """Runs both; what they have in common, and what the kills cost."""
    folder.mkdir(parents=True)
    unbroken, killed = folder / "unbroken", folder / "killed"
    train(folder / "first")  # So that both find the compiled programs.
    seconds = train(unbroken)
    kills = plan(num_kills)
    lost = [kill(killed, *each, seed) for seed, each in enumerate(kills)]
    last = train(killed)
    useful = step_seconds(unbroken)
    ours, theirs = outcome(killed), outcome(unbroken)
    return {
        "kills": {phase: sum(p == phase for _, p in kills) for phase in killed_command.PHASES},
        "same": {key: ours[key] == theirs[key] for key in ours},
        "unbroken_seconds": round(seconds, 1),
        "killed_seconds": round(sum(lost) + last, 1),
        "seconds_per_kill_p50": round(statistics.median(lost), 1),
        "useful_seconds": round(useful, 2),
        "goodput_unbroken": round(useful / seconds, 4),
        "goodput_killed": round(useful / (sum(lost) + last), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=len(killed_command.PHASES))
    given = parser.parse_args()
    print(json.dumps(compare(given.folder, given.kills), indent=2))
