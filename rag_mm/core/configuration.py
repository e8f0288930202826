"""Config pages: `configs/NAME.py:preset` makes a config, dataclasses fill it, dotted overrides change it."""

import ast
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from rag_mm.core import renames
from rag_mm.core.errors import UserError

T = TypeVar("T")
_PACKAGE = pathlib.Path(__file__).parent.parent
# In an installed wheel the pages are inside the package, in a checkout next to it.
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Section:
    """The dataclass that defines a part of a config, less the fields that are set elsewhere."""

    cls: type
    without: tuple[str, ...] = ()


# From a page's values to the sections that they name; the section "" defines top-level settings.
Sections = Callable[[Mapping[str, Any]], Mapping[str, Section]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value of a config: its dotted path, its meaning, and whether it differs from the default."""

    path: str
    value: Any
    meaning: str
    is_default: bool


def load_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    sections: Sections | None = None,
) -> ml_collections.ConfigDict:
    """Loads `configs/NAME.py` or `configs/NAME.py:preset`, fills it and applies `overrides`.

    A page defines `PRESETS`, a tuple of names with the default first, and `get_config(preset)`,
    which returns a ConfigDict or a nested dict of numbers, strings, booleans, None and tuples. It
    spells only what differs from the defaults of the dataclasses.

    Args:
        name: the path as given if it exists, else the page of that name shipped with rag_mm; the preset
            follows the last colon, since paths may hold some themselves.
        overrides: dotted key -> text, as `{"decoder.loop.num_steps": "300"}`; see `apply_overrides`.
        sections: the dataclasses that define the page; None leaves it as it is written.

    Raises:
        UserError: unknown page, preset or setting, or an override of the wrong type.
    """
    path_text, preset = _split(name)
    page = _load_page(_find(path_text))
    presets = tuple(page.PRESETS)
    if preset and preset not in presets:
        raise UserError(f"{path_text} has no preset {preset!r}; it has {_list(presets)}.")
    values = to_dict(page.get_config(preset or presets[0]), keep_tuples=True)
    if sections is not None:
        values = fill(values, sections)
    # The variants of an ablation are overrides, whose keys are dotted.
    config = ml_collections.ConfigDict(values, allow_dotted_keys=True)
    apply_overrides(config, overrides or {})
    if sections is not None:  # An override may have replaced a None by part of a group.
        filled = fill(to_dict(config, keep_tuples=True), sections)
        config = ml_collections.ConfigDict(filled, allow_dotted_keys=True)
    return config.lock()


def apply_overrides(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets existing keys in place, each value read as the type of the one that it replaces.

    A value is text from a command line, or a plain value. Tuples are written `16,24` or
    `((1, 8), ())`; a setting that is None takes any Python literal, or else the text itself. A whole group is
    replaced by a dict, such as `{"mesh": (2, 2, 2)}`.

    Raises:
        UserError: an unknown key (the nearest one, or the new name of a renamed one, is given) or a
            value of the wrong type.
    """
    known, groups = dict(_flatten(config)), set(_groups(config))
    for key, given in overrides.items():
        group = _parse_group(given) if key in groups else None
        if group is None and key not in known:
            raise UserError(f"The config has no key {key!r}{_near(key, known)}.")
        try:
            value = _parse(given, known[key]) if group is None else group
        except (ValueError, SyntaxError, KeyError):
            kind = type(known[key]).__name__
            raise UserError(
                f"--config.{key}={given} does not fit: the current value is {known[key]!r}, of type {kind}."
            ) from None
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[last] = value


def fill(values: Mapping[str, Any], sections: Sections) -> dict[str, Any]:
    """The config with every setting of its sections, defaults where the page has none.

    Raises:
        UserError: a setting that the section's dataclass does not have.
    """
    known = sections(values)
    filled = dict(values)
    if "" in known:
        top = {key: value for key, value in values.items() if key not in known}
        filled = fill_dataclass(known[""], top, "") | filled
    for name, section in known.items():
        if name:
            filled[name] = fill_dataclass(section, values.get(name, {}), name)
    return filled


def fill_dataclass(section: Section, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with every field of the section's dataclass, nested ones too; required ones may be absent."""
    filled = {}
    fields = _fields(section)
    _refuse_unknown(values, fields, where)
    for name, field in fields.items():
        value = values[name] if name in values else _default(field)
        if value is dataclasses.MISSING:
            continue
        inner = _section_of(section.cls, field)
        if inner is not None and dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {each: getattr(value, each) for each in _fields(inner)}
        if inner is not None and isinstance(value, Mapping):
            value = fill_dataclass(inner, value, f"{where}.{name}".lstrip("."))
        filled[name] = value
    return filled


def settings(config: Mapping[str, Any], sections: Sections) -> list[Setting]:
    """Every value of a filled config with its meaning, in the order of its sections."""
    return [
        setting
        for name, section in sections(config).items()
        for setting in _describe(section, config[name] if name else config, name)
    ]


def meanings(cls: type) -> dict[str, str]:
    """Field -> meaning, from the `Attributes:` part of the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        doc = each.__dict__.get("__doc__") or ""
        _, _, listed = doc.partition("Attributes:\n")
        entry: list[str] = []
        indent = re.match(r" *", listed).group()  # type: ignore[union-attr]
        for line in listed.splitlines():
            start = re.match(rf"{indent}(\w+(?:, \w+)*): (.+)", line)
            if start:
                entry = start[1].split(", ")
                found |= dict.fromkeys(entry, start[2].strip())
            elif line.startswith(f"{indent}  ") and entry:
                found |= dict.fromkeys(entry, f"{found[entry[0]]} {line.strip()}")
            else:
                entry = []
    return found


def group_of(field: "dataclasses.Field[Any]") -> Section | None:
    """The section of a field whose metadata is `part_of` a dataclass, else None."""
    return field.metadata.get("section")


def without_defaults(section: Section, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section that differ from their defaults."""
    defaults = {name: _plain(_default(field)) for name, field in _fields(section).items()}
    return {name: value for name, value in values.items() if _plain(value) != defaults[name]}


def part_of(cls: type, without: tuple[str, ...] = ()) -> dict[str, Section]:
    """Metadata of a field, typed Mapping, that holds `cls`'s values except those known only later."""
    return {"section": Section(cls, without)}


def to_dict(config: Mapping[str, Any], keep_tuples: bool = False) -> dict[str, Any]:
    """The config as nested plain dicts with JSON's types only (tuples become lists unless kept)."""
    return {key: _plain(value, keep_tuples) for key, value in config.items()}


def make(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from nested plain values; lists become tuples.

    Raises:
        UserError: an unknown or missing key, or a value that the class refuses; `where` is named.
    """
    hints = typing.get_type_hints(cls)
    fields = _fields(Section(cls))
    _refuse_unknown(values, fields, where)
    made = {}
    for key, value in values.items():
        own = _dataclass_of(hints[key])
        if isinstance(value, Mapping) and own is not None:
            value = make(own, value, f"{where}.{key}")
        made[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(made[key], hints[key]):
            raise UserError(f"{where}.{key} is {value!r}; give {_type_name(hints[key])}.")
    try:
        return cls(**made)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {error}.") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _near(key: str, known: Mapping[str, Any]) -> str:
    """The end of an error message: the new name, what a group holds, the nearest key, or what there is."""
    if hint := renames.hint(key):
        return hint
    members = [each for each in known if each.startswith(f"{key}.")]
    if members:
        return f": it is a group; set one of {_list(members)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    parent = key.rpartition(".")[0]
    siblings = [each for each in known if parent and each.rpartition(".")[0] == parent]
    if near:
        return f"; the nearest is {near[0]}"
    if siblings:
        return f"; {parent} has {_list([each.rpartition('.')[2] for each in siblings])}"
    return f"; it has {_list(list(dict.fromkeys(each.partition('.')[0] for each in known)))}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has the annotated type; an int is a float, and other types are not judged."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, bool, str):
        return type(value) is hint
    if origin is tuple and isinstance(value, tuple | list):
        if inner[1:] == (...,):
            return all(_fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return origin is not tuple


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _split(name: str) -> tuple[str, str]:
    """Page and preset; the preset is empty where none is given."""
    path_text, colon, preset = name.rpartition(":")
    if not colon or "/" in preset or pathlib.Path(name).is_file():
        return name, ""
    return path_text, preset


def _find(path_text: str) -> pathlib.Path:
    given = pathlib.Path(path_text)
    if given.is_file():
        return given
    # `configs/quickstart.py`, `quickstart.py` and `quickstart` all name the shipped page.
    file_name = given.name if given.suffix == ".py" else f"{given.name}.py"
    if given.parent in (pathlib.Path("."), pathlib.Path("configs")):
        for folder in _SHIPPED:
            if (folder / file_name).is_file():
                return folder / file_name
    shipped = sorted({f"configs/{p.name}" for folder in _SHIPPED for p in folder.glob("[!_]*.py")})
    hint = renames.hint(f"configs/{file_name}") or f"; shipped are {_list(shipped)}"
    raise UserError(f"There is no config {path_text!r}{hint}.")


def _load_page(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"rag_mm_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a page configs/NAME.py.")
    page = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(page)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable Python page ({error}).") from error
    missing = [name for name in ("PRESETS", "get_config") if not hasattr(page, name)]
    if missing:
        raise UserError(f"{path} is not a config page: it does not define {' or '.join(missing)}.")
    return page


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if "." in key:  # An override that the page spells out, not a setting.
            continue
        if isinstance(value, ml_collections.ConfigDict):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _groups(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield f"{prefix}{key}"
            yield from _groups(value, f"{prefix}{key}.")


def _parse_group(given: Any) -> ml_collections.ConfigDict | None:
    """A dict, or the text of one; None for anything else."""
    try:
        value = ast.literal_eval(given) if isinstance(given, str) else given
    except (ValueError, SyntaxError):
        return None
    if not isinstance(value, Mapping):
        return None
    return ml_collections.ConfigDict(value, allow_dotted_keys=True)


def _parse(given: Any, current: Any) -> Any:
    """A value, or the text of one, as the type of the current one."""
    if isinstance(current, bool):
        return given if isinstance(given, bool) else _BOOLEANS[str(given).lower()]
    if isinstance(current, int):
        return int(str(given))
    if isinstance(current, float):
        value = float(given)
        if not math.isfinite(value):
            raise ValueError(given)
        return value
    if isinstance(current, str):
        return str(given)
    if isinstance(current, tuple | list):
        return _parse_sequence(given, current)
    if not isinstance(given, str):
        return given
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return given


def _parse_sequence(given: Any, current: tuple[Any, ...] | list[Any]) -> Any:
    items = given
    if isinstance(given, str):
        inner = given.strip()
        try:
            items = ast.literal_eval(inner)
        except (ValueError, SyntaxError):
            inner = inner[1:-1] if inner[:1] + inner[-1:] in ("()", "[]") else inner
            items = [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]
    if not isinstance(items, tuple | list):
        items = (items,)
    example = current[0] if current else None
    return type(current)(
        tuple(item) if isinstance(item, tuple | list) else _parse(item, example) for item in items
    )


def _plain(value: Any, keep_tuples: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {key: _plain(item, keep_tuples) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_plain(item, keep_tuples) for item in value]
        return tuple(items) if keep_tuples else items
    return value


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _fields(section: Section) -> dict[str, "dataclasses.Field[Any]"]:
    fields = (field for field in dataclasses.fields(section.cls) if field.init)
    return {field.name: field for field in fields if field.name not in section.without}


def _refuse_unknown(values: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in fields:
            path = f"{where}.{name}".lstrip(".")
            hint = renames.hint(path) or f"; it has {_list(sorted(fields))}"
            raise UserError(f"{where or 'The config'} has no setting {name!r}{hint}.")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _section_of(cls: type, field: "dataclasses.Field[Any]") -> Section | None:
    """The section that a field's values make up, or None for a single value."""
    if "section" in field.metadata:
        return field.metadata["section"]
    own = _dataclass_of(typing.get_type_hints(cls)[field.name])
    return None if own is None else Section(own)


def _dataclass_of(hint: Any) -> type | None:
    """The one dataclass that a field may hold, other than None; None where it holds other values."""
    classes = [
        each
        for each in typing.get_args(hint) or (hint,)
        if isinstance(each, type) and dataclasses.is_dataclass(each)
    ]
    return classes[0] if len(classes) == 1 else None


def _describe(section: Section, values: Mapping[str, Any], where: str) -> Iterator[Setting]:
    """The settings of a section; the fields of a nested section one by one."""
    meaning = meanings(section.cls)
    for name, field in _fields(section).items():
        if name not in values:
            continue
        value, path = values[name], f"{where}.{name}".lstrip(".")
        inner = _section_of(section.cls, field)
        if inner is not None and isinstance(value, Mapping):
            yield from _describe(inner, value, path)
            continue
        default = _default(field)
        yield Setting(path, value, meaning.get(name, ""), _plain(value) == _plain(default))
