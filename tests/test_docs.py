"""README and docs: links resolve, quoted commands parse, named code exists.

The ten questions of docs/newcomer.md are followed click by click.
"""

import argparse
import ast
import functools
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import rag_mm
from rag_mm import report
from rag_mm.cli import main
from rag_mm.core import configuration
from rag_mm.core.errors import UserError
from rag_mm.perf.plan import cases
from rag_mm.stages import chain_config

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
NEWCOMER = ROOT / "docs" / "newcomer.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
# It lists names that no longer exist.
OLD_NAMES = ROOT / "docs" / "renames.md"
FOLDERS = {path.name for path in (ROOT / "rag_mm").iterdir() if path.is_dir()}
LAUNCHERS = (
    "rag-mm",
    r"launch/(?:local|gpu)\.sh",
    r"launch/slurm\.sbatch",
    r"launch/tpu_pod\.sh run",
)
LINK = re.compile(r"(?<!\\)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")

pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().removesuffix(".md")
)


def prose(page: pathlib.Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def resolve(page: pathlib.Path, target: str) -> tuple[pathlib.Path, str]:
    """The path and the anchor of a relative link."""
    path, _, anchor = target.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


def links(page: pathlib.Path) -> list[tuple[str, pathlib.Path, str]]:
    """(label, path, anchor) of every relative link outside fenced blocks."""
    found = LINK.findall(INLINE.sub(_keep_labels, prose(page)))
    return [(label, *resolve(page, to)) for label, to in found if not re.match(r"\w+:", to)]


def _keep_labels(code: re.Match[str]) -> str:
    # Code that itself holds a link's signs is none; a label may well be code.
    return code.group() if not LINK.search(code.group()) else ""


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of the page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE)
    plain = (LINK.sub(r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def members(path: pathlib.Path) -> set[str]:
    """Functions, classes and constants of a Python file, and `Class.member`."""

    def names(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef) and not prefix:
                yield from names(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names(ast.parse(path.read_text()).body))


def named_code(page: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """(Python file, name) of ``[file](to/file.py) `name` `` and ``[`name`](to/file.py)``."""
    pattern = re.compile(LINK.pattern + r"(?: `([^`]+)`)?")
    for label, target, behind in pattern.findall(prose(page)):
        path, _ = resolve(page, target)
        for text in (behind, *re.findall(r"^`([^`]+)`$", label)):
            if path.suffix == ".py" and NAME.fullmatch(text) and not text.endswith(".py"):
                parts = text.removesuffix("()").split(".")
                is_below = path.stem in parts[:-1]  # as in `train.loop.fit`
                yield path, ".".join(parts[parts.index(path.stem) + 1 :] if is_below else parts)


def commands(page: pathlib.Path) -> Iterator[tuple[str, list[str], bool]]:
    """(as quoted, words behind `rag-mm`, whether all of them can be copied) of every command line."""
    blocks = "\n".join(block for _, block in FENCE.findall(page.read_text()))
    fenced = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    for line in [*fenced, *INLINE.findall(prose(page))]:
        quoted = re.sub(r'^\w+="(.*)"$', r"\1", line.strip())
        found = re.search(rf"(?:^|[\s/])(?:{'|'.join(LAUNCHERS)})\s+(.+?)(?:\s[>&]\s.*)?$", quoted)
        if found:
            words = shlex.split(found.group(1), comments=True)
            is_whole = line in fenced and not re.search(r"\.\.\.|\s\|\s|[\[\]$]|^\w+=", line)
            yield line, words, is_whole


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    parser = main.Parser(prog=name)
    parser.add_argument("--json", action="store_true")
    main.load_command(name).add_arguments(parser)
    return parser


def options_of(name: str, words: list[str]) -> set[str]:
    """The options of a command, or of the subcommand that the words choose."""
    parser = parser_of(name)
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words:
            chosen = re.split(r"[|/]", words[0])
            unknown = [word for word in chosen if word not in action.choices and word.islower()]
            assert not unknown, f"rag-mm {name} has no {unknown[0]}"
            for word in chosen:
                found |= set(getattr(action.choices.get(word), "_option_string_actions", ()))
    return found


def is_placeholder(text: str) -> bool:
    """Whether a reader is to put something else in its place, as in --out=MEM."""
    return not text or "..." in text or text.strip("[]<>").isupper()


def sections(page: Mapping[str, Any]) -> Mapping[str, configuration.Section]:
    """The dataclasses of a config page, as `rag-mm train --show` chooses them."""
    return cases.sections(page) if "family" in page else chain_config.sections(page)


@functools.cache
def presets(path: str) -> tuple[str, ...]:
    return tuple(configuration._load_page(ROOT / path).PRESETS)


@functools.cache
def config_keys() -> frozenset[str]:
    """Dotted keys of every preset of every config page."""
    found: set[str] = set()
    for page in sorted((ROOT / "configs").glob("[!_]*.py")):
        for preset in presets(f"configs/{page.name}"):
            config = configuration.load_config(f"configs/{page.name}:{preset}", None, sections)
            plain = configuration.to_dict(config)
            found |= {setting.path for setting in configuration.settings(plain, sections)}
    return frozenset(found)


def test_the_readme_fits_two_screens():
    assert len(README.read_text().splitlines()) <= 150


@pages
def test_relative_links_resolve(page):
    problems = []
    for label, path, anchor in links(page):
        if not (path.exists() and path.is_relative_to(ROOT)):
            problems.append(f"[{label}]: there is no {path}")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            problems.append(f"[{label}]: {path.name} has no heading #{anchor}")
    assert not problems


def test_every_page_is_reached_from_the_readme():
    seen: set[pathlib.Path] = set()
    todo = {README}
    while todo:
        page = todo.pop()
        seen.add(page)
        todo |= {path for _, path, _ in links(page) if path.suffix == ".md"} - seen
    assert not set(PAGES) - seen


@pages
def test_named_code_exists(page):
    assert not [
        f"{path.relative_to(ROOT)} defines no {name}"
        for path, name in named_code(page)
        if not path.exists() or name not in members(path)
    ]


@pages
def test_dotted_names_and_paths_exist(page):
    problems = []
    for code in INLINE.findall(prose(page)) if page != OLD_NAMES else ():
        is_path = re.fullmatch(r"(?:[a-z][\w.]*/)+[a-z]\w*\.(?:py|sh|sbatch|yaml|ipynb)", code)
        if is_path and not any((base / code).exists() for base in (ROOT, ROOT / "rag_mm")):
            problems.append(code)
        dotted = re.fullmatch(r"(rag_mm\.)?(\w+)((?:\.\w+)+)(?:\(\))?", code)
        is_file = pathlib.Path(code).suffix in (".html", ".json", ".jsonl", ".npy", ".md", ".py")
        if dotted and not is_file and (dotted.group(1) or dotted.group(2) in FOLDERS):
            is_key = not dotted.group(1) and code in config_keys()
            if not (is_key or exists(code.removesuffix("()").removeprefix("rag_mm."))):
                problems.append(code)
    assert not problems


def exists(dotted: str) -> bool:
    """Whether `folder.module.name` is a module of rag_mm, or something that one defines."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        base, rest = ROOT.joinpath("rag_mm", *parts[:count]), parts[count:]
        if base.is_dir() and not rest:
            return True
        if base.with_suffix(".py").exists():
            return not rest or ".".join(rest) in members(base.with_suffix(".py"))
    return len(parts) == 1 and hasattr(rag_mm, parts[0])


def check_command(words: list[str], is_whole: bool) -> None:
    """Raises UserError, or AssertionError, where the words behind `rag-mm` would be refused."""
    name, rest = words[0], words[1:]
    assert name in main.COMMANDS, f"there is no command {name}"
    config, overrides, options = "", {}, options_of(name, rest)
    for word in (word.strip("[]") for word in rest):
        option, _, value = word.partition("=")
        if option.startswith("--config."):
            key = option.removeprefix("--config.")
            assert key in config_keys(), f"no config has {key}"
            overrides |= {} if is_placeholder(value) else {key: value}
        elif option.startswith("-") and len(option) > 1:
            assert option in options | {"--help"}, f"there is no {option}"
        if option == "--config" and not is_placeholder(value):
            config = value
    if config:
        configuration.load_config(config, overrides, sections)
    if is_whole:
        main._parse(name, main.load_command(name), rest)


@pages
def test_commands_and_options_exist(page):
    problems = []
    for quoted, words, is_whole in commands(page) if page != OLD_NAMES else ():
        if words and not is_placeholder(words[0]) and not words[0].startswith("-"):
            try:
                check_command(words, is_whole)
            except (AssertionError, UserError) as error:
                problems.append(f"{quoted}: {error}")
    assert not problems


@pages
def test_overrides_exist(page):
    """Those quoted alone; a page may also override settings of a stage that it defines itself."""
    keys = re.findall(r"--config\.([a-z]\w*\.[\w.]*)=", " ".join(INLINE.findall(prose(page))))
    own = re.findall(r'"(\w+)": Stage\(', page.read_text())
    assert not {key for key in keys if key.split(".")[0] not in own} - config_keys()


@pages
def test_config_pages_and_presets_exist(page):
    problems = []
    text = page.read_text() if page != OLD_NAMES else ""
    for path, preset in re.findall(r"\b(configs/[a-z]\w*\.py)(?::([\w.]*\w))?", text):
        if not (ROOT / path).exists():
            problems.append(path)
        elif preset and preset not in (*presets(path), "preset"):
            problems.append(f"{path}:{preset}")
    assert not problems


@pages
def test_python_blocks_parse(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(block)


def test_the_quickstart_page_shows_what_the_command_prints():
    lines = (ROOT / "docs" / "quickstart.md").read_text()
    for label, _, _ in report.summary_table({}):
        assert f"\n{label}  " in lines and f"\n| {label} |" in lines, label


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_what_exists(path):
    """`from rag_mm.a import b`, and `b.name` where b is a module; slow tests run the cells."""
    problems = []
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    tree = ast.parse(re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", "\n".join(sources)))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rag_mm"):
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}".removeprefix("rag_mm.")
                problems += [] if exists(dotted) else [dotted]
                if ROOT.joinpath("rag_mm", *dotted.split(".")).with_suffix(".py").exists():
                    modules[alias.asname or alias.name] = dotted
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{modules.get(node.value.id)}.{node.attr}"
            problems += [] if node.value.id not in modules or exists(dotted) else [dotted]
    assert not problems


def questions() -> list[tuple[str, str]]:
    """Each question of the newcomer's page with the line that begins with `Path:`."""
    sections = re.split(r"^### ", NEWCOMER.read_text(), flags=re.MULTILINE)[1:]
    return [
        (
            section.splitlines()[0],
            next(line for line in section.splitlines() if line.startswith("Path:")),
        )
        for section in sections
    ]


def test_there_are_ten_questions():
    assert len(questions()) == 10


@pytest.mark.parametrize("path_line", [pytest.param(path, id=name) for name, path in questions()])
def test_a_newcomer_gets_there_in_three_clicks(path_line):
    """From the README each page links to the next, and the last file defines what the path names."""
    stops = [resolve(NEWCOMER, target)[0] for _, target in LINK.findall(path_line)]
    assert stops[0] == README and 2 <= len(stops) <= 4
    for page, target in itertools.pairwise(stops):
        assert target in {path for _, path, _ in links(page)}, (
            f"{page.name} does not link to {target}"
        )
    if stops[-1].suffix == ".py":
        name = re.search(r"`([\w.]+)`$", path_line)
        assert name and name.group(1) in members(stops[-1])


def test_the_glossary_is_in_order():
    page = (ROOT / "docs" / "glossary.md").read_text()
    words = [
        line.split("|")[1].strip().lower() for line in page.splitlines() if line.startswith("| ")
    ]
    keys = [re.sub(r"[^a-z0-9 ]", "", word) for word in words[1:]]
    assert keys == sorted(keys)
