"""Experiment pages: `configs/NAME.py:preset` makes a config, dotted overrides change it."""

import ast
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from rag_mm.core.errors import UserError

T = TypeVar("T")
_PACKAGE = pathlib.Path(__file__).parent.parent
# In an installed wheel the pages lie in the package, in a checkout beside it.
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load_config(name: str, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """Loads `configs/NAME.py` or `configs/NAME.py:preset` and applies `overrides`.

    A page defines `PRESETS`, a tuple of names with the default first, and `get_config(preset)`,
    which returns a ConfigDict or a nested dict of numbers, strings, booleans, None and tuples.

    Args:
        name: the path as given if it exists, else the page of that name shipped with rag_mm.
        overrides: dotted key -> text, as `{"decoder.num_steps": "300"}`; see `apply_overrides`.

    Raises:
        UserError: no such page, no such preset, or an override that does not fit.
    """
    path_text, _, preset = name.partition(":")
    page = _load_page(_find(path_text))
    presets = tuple(page.PRESETS)
    if preset and preset not in presets:
        raise UserError(f"{path_text} has no preset {preset!r}; it has {_list(presets)}.")
    # An ablation's page spells out overrides, whose keys are dotted.
    config = ml_collections.ConfigDict(
        _apart(page.get_config(preset or presets[0])), allow_dotted_keys=True
    )
    apply_overrides(config, overrides or {})
    return config.lock()


def apply_overrides(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets existing keys in place, each text read as the type of the value that it replaces.

    Tuples are written `16,24` or `(16, 24)`; where the page says None, any Python literal or text
    will do.

    Raises:
        UserError: an unknown key (the nearest one is named) or a text of the wrong type.
    """
    known = dict(_flatten(config))
    for key, text in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"The config has no key {key!r}{hint}.")
        try:
            value = _parse(text, known[key])
        except (ValueError, SyntaxError, KeyError):
            kind = type(known[key]).__name__
            raise UserError(
                f"--config.{key}={text} does not fit: the page has {known[key]!r}, of type {kind}."
            ) from None
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[last] = value


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as nested plain dicts with JSON's types only (tuples become lists)."""
    return {key: _plain(value) for key, value in config.items()}


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
    raise UserError(f"There is no config {path_text!r}; shipped are {_list(shipped)}.")


def _apart(value: Any) -> Any:
    """Where a page gives two stages one dict, an override of one must not reach the other."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return value


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
        raise UserError(f"{path} is not a config page: it defines no {' and no '.join(missing)}.")
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


def _parse(text: str, current: Any) -> Any:
    if isinstance(current, bool):
        return _BOOLEANS[text.lower()]
    if isinstance(current, int):
        return int(text)
    if isinstance(current, float):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    if isinstance(current, str):
        return text
    if isinstance(current, tuple | list):
        return _parse_sequence(text, current)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse_sequence(text: str, current: tuple[Any, ...] | list[Any]) -> Any:
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    parts = [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]
    if not current:
        return type(current)(_parse(part, None) for part in parts)
    return type(current)(_parse(part, current[0]) for part in parts)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def make(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from nested plain values; lists become tuples.

    Raises:
        UserError: an unknown or missing key, or a value that the class refuses; `where` is named.
    """
    hints = typing.get_type_hints(cls)
    fields = set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise UserError(f"{where} has no setting {unknown[0]!r}; it has {_list(sorted(fields))}.")
    made = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and (own := _dataclass_of(hints[key])) is not None:
            value = make(own, value, f"{where}.{key}")
        made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**made)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}.") from error


def _dataclass_of(hint: Any) -> type | None:
    """The one dataclass that a field may hold, beside None; None where it holds other values."""
    kinds = [
        kind
        for kind in typing.get_args(hint) or (hint,)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    return kinds[0] if len(kinds) == 1 else None
