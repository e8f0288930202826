"""`rag-mm train --show`: every value of a config, with its meaning."""

import argparse
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
import rich.text

from rag_mm.core import configuration
from rag_mm.core.errors import UserError


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns `config`, its name; `settings`: path, value, meaning and whether it is the default; and
    `problem`, why `rag-mm train` would refuse it, such as a folder that is still to be named, or None.
    """
    from rag_mm.perf.plan import cases
    from rag_mm.stages import chain_config

    def sections(page: Mapping[str, Any]) -> dict[str, configuration.Section]:
        """A page of a model's sizes has a family, a page of a chain has stages."""
        return cases.sections(page) if "family" in page else chain_config.sections(page)

    config = configuration.load_config(args.config, args.overrides, sections)
    plain = configuration.to_dict(config)
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
    return {"config": args.config, "settings": settings, "problem": _problem(plain)}


def _problem(config: dict[str, Any]) -> str | None:
    from rag_mm.stages import chain_config

    if "stages" not in config:
        return None
    try:
        chain_config.stage_configs(config)
    except UserError as error:
        return str(error)
    return None


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
        "\n* differs from the default. Change a value with --config.KEY=VALUE.", markup=False
    )
    if result["problem"] is not None:
        console.print(f"As it is, train refuses it: {result['problem']}", markup=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(value)}: ..}}"
    return str(_as_tuple(value))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
