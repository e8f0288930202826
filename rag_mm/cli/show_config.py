"""`rag-mm train --show`: every value of a config, with its meaning."""

import argparse
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
import rich.text

from rag_mm.core import configuration


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns `config`, its name, and `settings`: path, value, meaning and whether it is the default."""
    from rag_mm.perf.plan import cases
    from rag_mm.stages import chain_config

    def sections(page: Mapping[str, Any]) -> dict[str, configuration.Section]:
        """A page of a model's sizes has a family, a page of a chain has stages."""
        return cases.sections(page) if "family" in page else chain_config.sections(page)

    config = configuration.load_config(args.config, args.overrides, sections)
    plain = configuration.to_dict(config)
    if "stages" in plain:  # A value that a stage refuses is refused here, too.
        chain_config.stage_configs(plain)
    listed = configuration.settings(plain, sections)
    settings = [
        {
            "path": setting.path,
            "value": setting.value,
            "meaning": setting.meaning,
            "is_default": setting.is_default,
        }
        for setting in listed
    ]
    return {"config": args.config, "settings": settings}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints a line for each value; `*` marks those that differ from their default."""
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for name, width in (("", None), ("setting", None), ("value", 48), ("meaning", None)):
        table.add_column(name, overflow="fold", max_width=width)
    section = ""
    for setting in result["settings"]:
        first = setting["path"].partition(".")[0] if "." in setting["path"] else ""
        if first != section:
            table.add_row()
            section = first
        mark = "" if setting["is_default"] else "*"
        value = _text(setting["value"])
        cells = (mark, setting["path"], value, setting["meaning"])
        table.add_row(*(rich.text.Text(cell) for cell in cells))
    console.print(table)
    console.print(
        "\n* differs from the default. Change a value with --config.SETTING=VALUE.", markup=False
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(value)}: ..}}"
    return str(_as_tuple(value))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
