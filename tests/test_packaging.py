"""The wheel holds what the commands need: code, pages, pictures; installed, it finds its own pages."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import fresh_python
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    for name in names:
        shutil.copy(ROOT / name, project)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rag_mm", "configs"):
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(project)], check=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_all_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    kinds = {".py", ".webp", ".json", ".css", ".j2", ".js", ".typed"}
    here = [path for path in (ROOT / "rag_mm").rglob("*") if path.suffix in kinds]
    wanted = {path.relative_to(ROOT).as_posix() for path in here if "__pycache__" not in path.parts}
    wanted |= {f"rag_mm/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert wanted <= held
    assert not any(name.startswith(("configs/", "tests/")) for name in held)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_pages(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = fresh_python.PROGRAMS / "load_installed_page.py"
    done = fresh_python.run(program, tmp_path, cwd=tmp_path, env=None, check=True)
    assert done.stdout == "{\n"
