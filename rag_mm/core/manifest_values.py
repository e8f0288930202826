"""Which values of a stage's config its manifest records, so that new fields leave finished runs valid."""

import dataclasses
from typing import Any

# Metadata of a dataclass field that manifests may lack: recorded only where it differs from its default.
ADDED_LATER = {"added_later": True}


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
