"""Which values of a stage's config its manifest records, so that new fields leave finished runs valid."""

import dataclasses
from typing import Any

# Metadata of a dataclass field that manifests may lack: recorded only where it differs from its default.
ADDED_LATER = {"added_later": True}


def recorded_as(path: str) -> dict[str, Any]:
    """Metadata of a field of a nested dataclass that manifests hold elsewhere: its older, dotted name."""
    return {"recorded_as": path}


def recorded(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain values, without the fields `ADDED_LATER` that have their default.

    Dataclasses in fields are treated likewise; those in a tuple or a mapping are recorded whole.
    """
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("added_later") and value == field.default:
            del values[field.name]
        elif dataclasses.is_dataclass(value):
            values[field.name] = recorded(value)
    return values


def under_older_names(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a dataclass, where what is `recorded_as` another name is under that name.

    A nested dataclass of which nothing is left is left out.
    """
    moved = dict(values)
    for field in dataclasses.fields(config):
        group, found = getattr(config, field.name), moved.get(field.name)
        if found is None or not dataclasses.is_dataclass(group):
            continue
        names: dict[str, str] = {
            inner.name: inner.metadata["recorded_as"]
            for inner in dataclasses.fields(group)
            if "recorded_as" in inner.metadata
        }
        if not names:
            continue
        moved[field.name] = {name: value for name, value in found.items() if name not in names}
        if not moved[field.name]:
            del moved[field.name]
        for name in found.keys() & names.keys():
            _set(moved, names[name], found[name])
    return moved


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path; dicts on the way are replaced by changed copies."""
    first, dot, rest = path.partition(".")
    if not dot:
        values[first] = value
        return
    values[first] = dict(values[first])
    _set(values[first], rest, value)
