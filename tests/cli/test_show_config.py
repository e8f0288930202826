"""`rag-mm train --show` prints every value of a config with its meaning, for every page."""

import dataclasses
import importlib
import json
import pathlib
import re

import pytest

import configs
from rag_mm.cli import main
from rag_mm.core import configuration
from rag_mm.stages import chain_config

PAGES = [
    (path.stem, preset)
    for path in sorted(pathlib.Path(configs.__file__).parent.glob("[!_]*.py"))
    for preset in importlib.import_module(f"configs.{path.stem}").PRESETS
]


def _show(capfd, *words: str) -> list[dict]:
    assert main.main(["train", "--show", "--json", *words]) == 0
    return json.loads(capfd.readouterr().out)["settings"]


def _literal(value) -> str:
    """A value as it is written on the command line."""
    as_tuple = lambda value: tuple(map(as_tuple, value)) if isinstance(value, list) else value
    return value if isinstance(value, str) else repr(as_tuple(value))


@pytest.mark.parametrize(("page", "preset"), PAGES)
def test_every_setting_of_every_page_has_a_meaning_and_can_be_set(capfd, page, preset):
    """All of them at once, each to the value that it has: none is refused, and nothing changes."""
    name = f"--config=configs/{page}.py:{preset}"
    settings = _show(capfd, name)
    assert len(settings) > 30
    assert [setting["path"] for setting in settings if len(setting["meaning"]) < 5] == []
    words = [f"--config.{each['path']}={_literal(each['value'])}" for each in settings]
    assert _show(capfd, name, *words) == settings


@pytest.mark.parametrize("page", sorted({page for page, _ in PAGES}))
def test_a_pages_header_says_what_each_preset_costs_and_gives(page):
    module = importlib.import_module(f"configs.{page}")
    for preset in module.PRESETS:
        (line,) = [
            line for line in module.__doc__.splitlines() if line.startswith(f"    {preset} ")
        ]
        assert len(line.split()) > 5
        # A figure or a duration, or plainly that there is none.
        assert re.search(r"\d|not (run|trained)|no figure|nothing|same shape", line), line


def test_what_is_shown_is_what_stages_are_made_from(capfd):
    """A value at a path is the one that the stage's frozen config has there."""
    name = "configs/quickstart.py:full"
    made = chain_config.stage_configs(chain_config.load(name))
    shown = {s["path"]: s["value"] for s in _show(capfd, f"--config={name}")}
    slices = {stage: dataclasses.asdict(config) for stage, config in made.items()}
    checked = 0
    for path, value in shown.items():
        stage, *keys = path.split(".")
        if stage not in slices or stage == "control" or not keys:
            continue
        found = slices[stage]
        for key in keys:
            found = found[key]
        assert configuration.to_dict({"": found})[""] == value, path
        checked += 1
    assert checked > 100


def test_an_override_is_shown_and_marked(capfd):
    words = ["--config=configs/quickstart.py:quick", "--config.decoder.alpha=1.0"]
    (alpha,) = [s for s in _show(capfd, *words) if s["path"] == "decoder.alpha"]
    assert alpha["value"] == 1.0 and not alpha["is_default"]


def test_a_person_sees_a_line_for_each_setting(capfd):
    assert main.main(["train", "--show", "--config=configs/quickstart.py:tiny"]) == 0
    text = capfd.readouterr().out
    (line,) = [line for line in text.splitlines() if "decoder.loop.num_steps" in line]
    assert line.split() == ["*", "decoder.loop.num_steps", "40", "training", "steps."]


def test_without_show_a_workdir_is_needed(capfd):
    assert main.main(["train", "--config=configs/quickstart.py:tiny"]) == 2
    assert "required: --workdir" in capfd.readouterr().err


def test_the_quickstart_page_spells_what_differs():
    """82 values before pages left out defaults; the measure is what a reader has to read."""

    def count(values) -> int:
        return sum(count(value) if isinstance(value, dict) else 1 for value in values.values())

    page = dict(importlib.import_module("configs.quickstart").quick())
    assert count({key: value for key, value in page.items() if key != "ablation"}) <= 55


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config=configs/own_images.py"], "documents is empty"),
        (["--config=configs/quickstart.py:tiny", "--config.decoder.alpha=-1"], "alpha is -1"),
    ],
)
def test_what_train_would_refuse_is_shown_with_the_reason(capfd, words, says):
    assert main.main(["train", "--show", "--json", *words]) == 0
    assert says in json.loads(capfd.readouterr().out)["problem"]
