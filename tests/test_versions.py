"""What setup.py admits is what CI runs: one lock file for Python 3.11, one for 3.12 and 3.13."""

import pathlib
import re
import sys
from unittest import mock

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PYTHONS = {"requirements.lock": (3, 11), "requirements-newest.lock": (3, 12)}
# Extras that no lock file has: each is for an environment of its own.
APART = ("bench", "beam", "gcs", "gpu")


def locked(name: str) -> dict[str, tuple[int, ...]]:
    pins = re.findall(r"^([\w.-]+)==([\d.]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {package: numbers(version) for package, version in pins}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.strip(".").split("."))


def requirements(python: tuple[int, int]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Package -> its bounds on that Python, of the base install and the extras that are locked."""
    setuptools = mock.MagicMock()  # Python 3.12 has none unless it is asked for.
    with mock.patch.dict(sys.modules, setuptools=setuptools):
        source = (ROOT / "setup.py").read_text()
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    arguments = setuptools.setup.call_args.kwargs
    extras = arguments["extras_require"]
    lines = [line for name in extras if name not in APART for line in extras[name]]
    bounds: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for line in [*arguments["install_requires"], *lines]:
        requirement, _, marker = line.partition(";")
        if any(
            not (python < numbers(limit) if sign == "<" else python >= numbers(limit))
            for sign, limit in re.findall(r"python_version (<|>=) '([\d.]+)'", marker)
        ):
            continue
        name, rest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", requirement).groups()
        found = [(sign, numbers(v)) for sign, v in re.findall(r"(>=|<|==|~=)([\d.]+)", rest)]
        bounds.setdefault(name.replace("_", "-"), []).extend(found)
    return bounds


CASES = [
    pytest.param(lock, name, sign, bound, id=f"{lock} {name}{sign}{'.'.join(map(str, bound))}")
    for lock, python in PYTHONS.items()
    for name, bounds in requirements(python).items()
    for sign, bound in bounds
    if name in locked(lock)  # torch is left to its extra's pin.
]


@pytest.mark.parametrize(("lock", "name", "sign", "bound"), CASES)
def test_each_bound_is_a_version_that_is_run(lock, name, sign, bound):
    """In as many numbers as the bound has: `<0.13` ends after 0.12.*, `>=0.2.8` begins at 0.2.8 itself.

    A lower bound of both Pythons is the older one's; a marker gives each Python its own.
    """
    version = locked(lock)[name]
    if sign == "<":
        assert version < bound
        newest = locked("requirements-newest.lock").get(name, version)
        last = newest if (sign, bound) in requirements((3, 12))[name] else version
        assert (*last[: len(bound) - 1], last[len(bound) - 1] + 1) == bound
    else:
        oldest = locked("requirements.lock")[name]
        first = oldest if (sign, bound) in requirements((3, 11))[name] else version
        assert first[: len(bound)] == bound and version >= bound


@pytest.mark.parametrize("lock", PYTHONS)
def test_a_lock_has_all_that_is_asked_for_once(lock):
    names = re.findall(r"^[\w.-]+(?===)", (ROOT / lock).read_text(), re.MULTILINE)
    assert len(names) == len(set(names))
    missing = requirements(PYTHONS[lock]).keys() - set(names)
    assert missing == {"torch"}


@pytest.mark.parametrize("lock", PYTHONS)
def test_a_lock_names_no_place(lock):
    """It pins versions; from where they come is for each machine to say."""
    for line in (ROOT / lock).read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line), line
        assert "://" not in line


def test_both_locks_have_the_same_linters():
    """So that `make lint` says the same on each Python."""
    ours, newest = (locked(lock) for lock in PYTHONS)
    assert [ours[name] for name in ("ruff", "mypy")] == [newest[name] for name in ("ruff", "mypy")]
