"""References in docstrings, comments and pages resolve: to a named paper, a file or a name in the code."""

import ast
import functools
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from rag_mm.stages import chain_config

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rag_mm"

# Papers whose sections and tables are cited by number, and those that are cited by our page in docs/papers,
# since nobody here has checked their numbers.
PAPERS = "CLIP CM3 CM3Leon Chameleon LLaMA MAGVIT OPT RICES VQGAN".split()
CITED_BY_PAGE = "RA-CM3 RECO SPAE Emu OVEN".split()
PAPER = re.compile(
    rf"(?<![\w-])(?:{'|'.join((*PAPERS, *CITED_BY_PAGE))})\b"
    r"|\b[A-Z]\w+(?: and [A-Z]\w+| et al\.),? \(?\d{4}"
)
NUMBER = re.compile(
    r"\b(?i:sections?|sec\.|tables?|equations?|eqs?\.|figures?|figs?\.|algorithms?)\s+\(?\d+(?:\.\d+)*\b"
    r"|§\s*\d|\b(?i:appendix|appendices)\s+[A-Z](?:\.\d+)*\b"
)
# Documents that are not in the repository, cited by their sections.
OUTSIDE = re.compile(
    r"\b(?:[Ss]pec|[Ss]pecification|[Dd]esign),? section|\bof the (?:spec|specification)\b"
    r"|(?<![\w/-])[\w-]+\.md,? (?:section )?\d"
)

DOCS_PATH = re.compile(r"(?<![\w/.-])docs/[\w./-]*\w(?:#[\w-]+)?")
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
FILE_ENDINGS = "css html ipynb js json jsonl md npy npz png py sh tar txt".split()
# Dotted names that are not ours: keys of metrics.json, and an argument.
NOT_OURS = (
    *("decoder.paired", "decoder.paired.PAIR", "sft.guidance", "sft.over_reliance", "sft.claims"),
    "table.T",
)
# Pages that list old names.
HISTORY = (ROOT / "docs" / "renames.md",)


class Passage(NamedTuple):
    """A docstring, a block of comments, a notebook's cell or a whole page, and its first line's number."""

    path: pathlib.Path
    line: int
    text: str

    def where(self, offset: int, what: str) -> str:
        """`file:line: what`, for the character at `offset`."""
        line = self.line + self.text[:offset].count("\n")
        return f"{self.path.relative_to(ROOT)}:{line}: {' '.join(what.split())}"


def _python_files() -> list[pathlib.Path]:
    folders = (PACKAGE, ROOT / "configs", ROOT / "tests")
    return [ROOT / "setup.py", *sorted(path for folder in folders for path in folder.rglob("*.py"))]


def _pages() -> list[pathlib.Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _docstrings(path: pathlib.Path, source: str) -> Iterator[Passage]:
    """Strings that are statements: of modules, classes, functions, and below attributes."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield Passage(path, value.lineno, value.value)


def _comments(path: pathlib.Path, source: str) -> Iterator[Passage]:
    """Comments; those on consecutive lines are one passage."""
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    else:
        stripped = [line.strip() for line in source.splitlines()]
        lines = [(i, line) for i, line in enumerate(stripped, 1) if line.startswith("#")]
    blocks: list[list[tuple[int, str]]] = []
    for number, line in lines:
        if not blocks or number != blocks[-1][-1][0] + 1:
            blocks.append([])
        blocks[-1].append((number, line.lstrip("# ")))
    for block in blocks:
        yield Passage(path, block[0][0], "\n".join(line for _, line in block))


@functools.cache
def passages() -> list[Passage]:
    """All text written for a reader."""
    found = [Passage(path, 1, path.read_text()) for path in _pages()]
    for path in _python_files():
        source = path.read_text()
        found += [*_docstrings(path, source), *_comments(path, source)]
    for path in sorted((ROOT / "launch").iterdir()):
        found += _comments(path, path.read_text())
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        found += [Passage(path, 1, "".join(cell["source"])) for cell in cells]
    return [passage for passage in found if passage.path != pathlib.Path(__file__)]


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """(offset, sentence); a paragraph, a heading, a list item and a table's row end one too."""
    start = 0
    ends = r"(?<!et al)(?<!sec)(?<!fig)(?<!eq)[.!?:](?=\s+[A-Z`\"*\[|])|\n\s*\n|\n(?=\s*(?:[|#]|[-*] ))|\Z"
    for match in re.finditer(ends, text):
        yield start, text[start : match.end()]
        start = match.end()


def _is_attached(sentence: str, place: int) -> bool:
    """Whether the number at `place` is of a paper: the last one named before it, else the first after."""
    papers = [(match.start(), match.group()) for match in PAPER.finditer(sentence)]
    before = [name for start, name in papers if start < place]
    name = (before[-1:] or [name for _, name in papers[:1]] or [None])[0]
    return DOCS_PATH.search(sentence) is not None or name not in (None, *CITED_BY_PAGE)


@pytest.mark.parametrize(
    ("sentence", "is_attached"),
    [
        ("Spans move to the end (CM3, section 2).", True),
        ("A figure of Radford et al. 2021, figure 3.", True),
        ("Only the decoder learns (docs/papers/ra_cm3.md, section 2).", True),
        ("See section 7 without its GAN terms.", False),
        ("Retrieval as in RA-CM3, section 3.1; RICES (Yang et al. 2022).", False),
    ],
)
def test_a_number_needs_a_paper(sentence, is_attached):
    assert _is_attached(sentence, NUMBER.search(sentence).start()) == is_attached


def test_numbered_parts_are_those_of_a_named_paper():
    """No bare "section 7"; RA-CM3, RECO, SPAE and Emu are cited through docs/papers."""
    broken = [
        passage.where(offset + match.start(), sentence)
        for passage in passages()
        for offset, sentence in sentences(passage.text)
        for match in NUMBER.finditer(sentence)
        if not _is_attached(sentence, match.start())
    ]
    broken += [
        passage.where(match.start(), passage.text[max(0, match.start() - 60) : match.end() + 30])
        for passage in passages()
        for match in OUTSIDE.finditer(passage.text)
    ]
    assert not broken, "\n".join(["", *broken])


@functools.cache
def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\]\([^)]*\)", "", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def _exists(folder: pathlib.Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = folder / name
    return path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors(path))


def test_pages_named_in_the_code_exist():
    """`docs/...`, with its anchor, anywhere in a file."""
    broken = []
    for path in [*_python_files(), *sorted((ROOT / "launch").iterdir()), ROOT / "Makefile"]:
        if path != pathlib.Path(__file__):
            whole = Passage(path, 1, path.read_text())
            for match in DOCS_PATH.finditer(whole.text):
                if not _exists(ROOT, match.group()):
                    broken.append(whole.where(match.start(), match.group()))
    assert not broken, "\n".join(["", *broken])


class Names(NamedTuple):
    """What a file defines: top-level names, and those inside each class, fields included."""

    top: set[str]
    classes: dict[str, set[str]]


@functools.cache
def names_of(path: pathlib.Path) -> Names:
    """The names that one file defines or imports."""
    tree = ast.parse(path.read_text())
    classes = {n.name: set(_bound(n)) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    return Names(set(_bound(tree)), classes)


def _bound(scope: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from _bound(node)
    if isinstance(scope, ast.ClassDef):  # Attributes that methods set.
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr


def defines(path: pathlib.Path, parts: list[str]) -> bool:
    """Whether a file defines `a` or `Class.b`; `a` may also be a field of one of its classes."""
    names = names_of(path)
    if not parts:
        return True
    if len(parts) == 1:
        return parts[0] in names.top or any(parts[0] in inside for inside in names.classes.values())
    return parts[1] in names.classes.get(parts[0], set())


@functools.cache
def _homes() -> dict[str, list[pathlib.Path]]:
    """Folders and files of the package by their last name."""
    homes: dict[str, list[pathlib.Path]] = {"rag_mm": [PACKAGE], "configs": [ROOT / "configs"]}
    for path in (*PACKAGE.rglob("*"), *(ROOT / "configs").glob("*.py")):
        if path.suffix == ".py" or (path / "__init__.py").exists():
            homes.setdefault(path.stem, []).append(path)
    return homes


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines."""

    def walk(path: pathlib.Path, parts: list[str]) -> bool:
        if path.suffix == ".py":
            return defines(path, parts)
        if not parts or ((path / "__init__.py").exists() and defines(path / "__init__.py", parts)):
            return True
        for inner in (path / parts[0], path / f"{parts[0]}.py"):
            if inner.exists() and walk(inner, parts[1:]):
                return True
        return path == PACKAGE and parts[0] == "configs" and walk(ROOT / "configs", parts[1:])

    first, *rest = dotted.split(".")
    is_key = first in {*chain_config.STAGES, *GROUPS} and rest[0] in _config_keys()
    return is_key or any(walk(home, rest) for home in _homes().get(first, []))


@functools.cache
def _config_keys() -> set[str]:
    """Fields of the stages' configs: `decoder.alpha` is one of a config page's values."""
    classes = [
        (name, fields)
        for path in (PACKAGE / "stages").rglob("*.py")
        for name, fields in names_of(path).classes.items()
    ]
    return {
        field
        for name, fields in classes
        if name.endswith(("Config", "Section", "World"))
        for field in fields
        if not field.startswith("_")
    }


# Groups of settings, which docs name without their stage.
GROUPS = {"world", "masking", "sequences", "model", "loop", "search", "init"}
# Modules that were renamed: a reference to one is dangling, and not somebody else's library.
FORMER_MODULES = frozenset(
    (
        "ablation asking bench_guard bench_memory bench_models bench_peak borrow choice clock "
        "compilation controls copying corpus device_index document_pairs encoder evaluation facts "
        "fusion generation guard interchange joining kinds labelled measured metrics modes "
        "neighbors opening own_pictures pairs params pictures plan_memory plans_page retriever "
        "scann_index scenes shard speed splits spread team tokenizer toy_pairs "
    ).split()
)


def test_dotted_names_resolve():
    """`module.function` and the like, where the first part is a module or a folder of ours."""
    broken = [
        passage.where(match.start(), match.group())
        for passage in passages()
        for match in DOTTED.finditer(passage.text)
        if match.group(1).split(".")[0] in {*_homes(), *chain_config.STAGES, *FORMER_MODULES}
        and match.group(1).split(".")[-1] not in FILE_ENDINGS
        and match.group(1) not in NOT_OURS
        and passage.path not in HISTORY
        and not resolves(match.group(1))
    ]
    assert not broken, "\n".join(["", *broken])
