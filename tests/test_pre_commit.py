"""What the hooks check before a commit is what `make lint` checks after it."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def pins(text: str, package: str) -> list[str]:
    return re.findall(rf"(?<![\w-]){package}==([\w.]+)", text)


def test_the_hooks_have_the_ruff_of_the_lock():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    (locked,) = pins((ROOT / "requirements.lock").read_text(), "ruff")
    assert pins(hooks, "ruff") == [locked]


def test_the_hooks_have_fixed_versions_and_need_no_repository():
    """Somebody with a fresh clone and the package registry has them all."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"repo: (.+)", hooks)) == {"local"}
    needed = re.findall(r"additional_dependencies: (?:&\w+ )?\[(.+)\]", hooks)
    assert needed and all(re.fullmatch(r"[\w-]+==[\w.]+", package) for package in needed)
