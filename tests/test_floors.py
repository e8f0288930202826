"""The house stands on its floors: imports run downwards only, and name nothing that setup.py does not."""

import ast
import collections
import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Iterator
from unittest import mock

import fresh_python
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rag_mm"

_BELOW_MODELS = {"core", "ops", "nn"}
_BELOW_DECODE = _BELOW_MODELS | {"models"}
_BELOW_REPORT = _BELOW_DECODE | {"decode", "frozen_lm", "train", "memory", "data", "worlds"}
_BELOW_STAGES = _BELOW_REPORT | {"corpus", "eval", "report"}
# What each floor may import besides itself.
FLOORS = {
    "core": set(),
    "ops": {"core"},
    "nn": {"core", "ops"},
    "models": _BELOW_MODELS,
    "memory": {"core", "ops"},
    "data": {"core", "memory"},
    "corpus": {"core", "memory", "data"},
    "worlds": {"core"},
    "decode": _BELOW_DECODE | {"data"},
    "convert": _BELOW_DECODE,
    "frozen_lm": _BELOW_DECODE | {"decode", "data", "convert"},
    "train": _BELOW_DECODE | {"decode", "data"},
    "eval": _BELOW_REPORT,
    "report": _BELOW_REPORT | {"eval"},
    "perf": _BELOW_DECODE | {"decode", "train", "data", "memory", "corpus"},
    "stages": _BELOW_STAGES | {"convert", "perf"},
    "api": _BELOW_STAGES | {"stages", "convert"},
    "cli": _BELOW_STAGES | {"stages", "api", "convert", "perf"},
}
# Heavy, or absent from the base install; where each may be imported, inside a function.
LAZY = {
    "tensorflow": set(),
    "torch": {"perf/bench/torch_peer.py"},
    "transformers": {"perf/bench/torch_peer.py"},
    "scann": {"memory/index/scann_searcher.py"},
    "faiss": {"perf/bench/faiss_peer.py"},
    "uvicorn": {"cli/explore.py", "api/explore_connections.py"},
    "apache_beam": {"data/beam_ingest.py"},
    "pyarrow": {"data/parquet_files.py"},
    "gguf": {"convert/gguf_format.py"},
    "openai": {"frozen_lm/endpoint.py"},
}


def _sources() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: pathlib.Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported with the module itself) of all that a file imports."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inner


def _floor(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_imports_run_down(floor):
    """A file imports its own floor and those below; lazy imports inside functions count too."""
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources()
        if _floor(path) == floor
        for name, _ in _imports(path)
        if name.startswith("rag_mm.") and name.split(".")[1] not in FLOORS[floor] | {floor}
    ]
    assert not upward


# Inside stages: what each system may import besides itself, the engine and `shared`.
SYSTEMS = {
    "shared": set(),
    "ra_cm3": set(),
    "reco": set(),
    "cm3leon": {"ra_cm3"},
    "spae": set(),
    "emu": set(),
}
# The engine's only files that know the systems: the one that collects their tables of stages.
COLLECTS = {"stages/chain_config.py"}


def _system(parts: list[str]) -> str:
    """The folder in `rag_mm.stages` of a dotted name, or "" for the engine."""
    return parts[2] if len(parts) > 2 and parts[2] in SYSTEMS else ""


def test_a_system_imports_the_engine_shared_and_what_its_paper_builds_on():
    """So that the engine knows no paper, and a paper can be read without the others."""
    wrong = []
    for path in (PACKAGE / "stages").rglob("*.py"):
        own = _system(["rag_mm", *path.relative_to(PACKAGE).with_suffix("").parts])
        may = {"shared", own} | SYSTEMS.get(own, set()) if own else {"shared"}
        where = path.relative_to(PACKAGE).as_posix()
        for name, _ in _imports(path):
            other = _system(name.split(".")) if name.startswith("rag_mm.stages.") else ""
            if other and other not in may and where not in COLLECTS:
                wrong.append(f"{where} imports {name}")
    assert not wrong


def test_a_systems_model_imports_no_other_systems():
    """Except that of the paper it builds on; cm3, clip and llama, are for all."""
    wrong = []
    for path in (PACKAGE / "models").rglob("*.py"):
        own = path.relative_to(PACKAGE / "models").parts[0].removesuffix(".py")
        for name, _ in _imports(path):
            parts = name.split(".")
            other = parts[2] if name.startswith("rag_mm.models.") else ""
            if other in SYSTEMS and other != own and other not in SYSTEMS.get(own, set()):
                wrong.append(f"{path.relative_to(PACKAGE).as_posix()} imports {name}")
    assert not wrong


def test_every_system_of_stages_is_listed():
    folders = {path.name for path in (PACKAGE / "stages").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= set(SYSTEMS)


def test_file_and_class_names_are_unique():
    """A name is enough to find a file or a class, and no import needs an alias for want of another."""
    files, classes = collections.Counter(), collections.Counter()
    for path in _sources():
        # A command is named after what it does, a system's table of stages after what it is.
        if path.stem not in ("__init__", "stages") and _floor(path) != "cli":
            files[path.stem] += 1
        tree = ast.parse(path.read_text())
        classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in (files + classes).items() if count > 1] == []


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(FLOORS)


@pytest.mark.parametrize("library", sorted(LAZY))
def test_heavy_libraries_are_imported_in_one_place(library):
    for path in _sources():
        for name, at_import in _imports(path):
            if name.split(".")[0] == library:
                where = path.relative_to(PACKAGE).as_posix()
                assert where in LAZY[library] and not at_import, f"{where} imports {name}"


def test_the_training_step_needs_no_data_libraries():
    """It runs on a bare accelerator image: following its imports meets jax, flax and optax only."""
    modules, todo, outside = set(), {PACKAGE / "train" / "train_step.py"}, set()
    while todo:
        path = todo.pop()
        modules.add(path)
        for name, at_import in _imports(path):
            if not at_import:
                continue
            parts = name.split(".")
            if parts[0] != "rag_mm":
                outside.add(parts[0])
                continue
            candidates = [ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])]
            todo |= {c.with_suffix(".py") for c in candidates if c.with_suffix(".py").exists()}
        todo -= modules
    assert not outside & {"scann", "grain", "clu", "tensorflow_datasets", "tensorflow"}


def test_importing_the_package_is_light():
    loaded = fresh_python.modules_loaded_by("rag_mm")
    assert not loaded & {"tensorflow", "torch", "scann", "tensorflow_datasets"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(*names: str) -> set[str]:
    """What the base install asks for, and these extras."""
    setuptools = mock.MagicMock()  # Python 3.12 has none unless it is asked for.
    with mock.patch.dict(sys.modules, setuptools=setuptools):
        source = (ROOT / "setup.py").read_text()
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    arguments = setuptools.setup.call_args.kwargs
    extras = arguments["extras_require"]
    lines = [*arguments["install_requires"], *(line for name in names for line in extras[name])]
    return {_normal(re.match(r"[\w.-]+", line).group()) for line in lines}


def test_everything_imported_is_declared():
    """No file leans on a package that is there only because another package wanted it."""
    packages = importlib.metadata.packages_distributions()
    declared = _declared("test", "bench", "parity", "explore", "beam", "gguf", "endpoint")
    for path in _sources():
        for name, _ in _imports(path):
            top = name.split(".")[0]
            if top == "rag_mm" or top in sys.stdlib_module_names:
                continue
            owners = {_normal(owner) for owner in packages.get(top, [f"{top}-cpu", top])}
            assert owners & declared, f"{path.relative_to(ROOT)} imports {top}: not in setup.py"


def test_the_base_install_has_neither_tensorflow_nor_torch():
    assert not _declared("test", "bench", "explore") & {
        "tensorflow",
        "tensorflow-cpu",
        "torch",
        "transformers",
    }
