"""A config is a page and a preset; overrides change values that exist, in the type they have."""

import dataclasses

import ml_collections
import pytest

from rag_mm.core import configuration
from rag_mm.core.errors import UserError

PAGE = '''
"""A page."""
PRESETS = ("quick", "tiny")


def get_config(preset):
    steps = {"quick": 800, "tiny": 8}[preset]
    return {
        "seed": 0,
        "decoder": {"num_steps": steps, "lr": 2e-3, "tied": True, "sizes": (16, 24), "note": None},
        "name": "emoji",
    }
'''


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.py"
    path.write_text(PAGE)
    return str(path)


def test_the_first_preset_is_the_default(page):
    assert configuration.load_config(page).decoder.num_steps == 800
    assert configuration.load_config(f"{page}:tiny").decoder.num_steps == 8


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("decoder.lr", "1", 1.0),
        ("decoder.tied", "false", False),
        ("decoder.sizes", "8,16,32", (8, 16, 32)),
        ("decoder.sizes", "(8,)", (8,)),
        ("decoder.note", "3", 3),
        ("decoder.note", "three", "three"),
        ("name", "12", "12"),
    ],
)
def test_an_override_is_read_as_the_type_it_replaces(page, key, text, value):
    flat = configuration.load_config(page, {key: text})
    for part in key.split("."):
        flat = flat[part]
    assert flat == value and type(flat) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "1.5"),
        ("decoder.lr", "nan"),
        ("decoder.lr", "fast"),
        ("decoder.tied", "2"),
        ("decoder.sizes", "a"),
    ],
)
def test_an_override_of_the_wrong_type_is_refused(page, key, text):
    with pytest.raises(UserError, match=f"--config.{key}={text} does not fit"):
        configuration.load_config(page, {key: text})


def test_an_unknown_key_names_the_nearest(page):
    with pytest.raises(
        UserError, match=r"no key 'decoder.steps'; the nearest is decoder.num_steps"
    ):
        configuration.load_config(page, {"decoder.steps": "3"})
    with pytest.raises(UserError, match="no key 'decoder'"):
        configuration.load_config(page, {"decoder": "3"})


def test_an_unknown_preset_or_page_lists_what_there_is(page):
    with pytest.raises(UserError, match=r"no preset 'huge'; it has quick, tiny"):
        configuration.load_config(f"{page}:huge")
    with pytest.raises(UserError, match=r"no config 'configs/nothing.py'; shipped are"):
        configuration.load_config("configs/nothing.py")


def test_a_shipped_page_is_found_from_anywhere(page, tmp_path, monkeypatch):
    """From another folder `configs/page.py` means the copy in the package."""
    monkeypatch.setattr(configuration, "_SHIPPED", (tmp_path,))
    monkeypatch.chdir("/")
    assert configuration.load_config("configs/page.py:tiny").decoder.num_steps == 8
    assert configuration.load_config("page").decoder.num_steps == 800


@pytest.mark.parametrize("text", ["def (", "x = 1", "\x00"])
def test_a_file_that_is_no_page_is_refused(tmp_path, text):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError, match="page"):
        configuration.load_config(str(path))


def test_a_config_is_locked_and_becomes_plain_dicts(page):
    loaded = configuration.load_config(page)
    with pytest.raises((KeyError, AttributeError)):
        loaded.decoder.typo = 1
    plain = configuration.to_dict(loaded)
    assert plain["decoder"]["sizes"] == [16, 24] and type(plain["decoder"]) is dict


def test_a_page_may_return_a_config_dict():
    made = ml_collections.ConfigDict({"a": {"b": (1, 2)}})
    configuration.apply_overrides(made, {"a.b": "3,4,5"})
    assert configuration.to_dict(made) == {"a": {"b": [3, 4, 5]}}


def test_an_override_of_one_leaves_the_other_that_the_page_gave_the_same_dict(tmp_path):
    path = tmp_path / "page.py"
    path.write_text(
        'PRESETS = ("one",)\nLOOP = {"num_steps": 4}\n'
        'def get_config(preset):\n    return {"a": {"loop": LOOP}, "b": {"loop": LOOP}}\n'
    )
    loaded = configuration.load_config(str(path), {"a.loop.num_steps": "5"})
    assert loaded.a.loop.num_steps == 5 and loaded.b.loop.num_steps == 4


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner | None = None


@pytest.mark.parametrize(("given", "made"), [({}, Inner()), ({"size": 2}, Inner(2)), (None, None)])
def test_a_part_that_may_be_missing_is_made_where_it_is_there(given, made):
    assert configuration.make(Outer, {"inner": given}, "outer") == Outer(made)


def test_a_wrong_part_is_named():
    with pytest.raises(UserError, match=r"outer.inner has no setting 'sise'"):
        configuration.make(Outer, {"inner": {"sise": 2}}, "outer")


@pytest.mark.parametrize("name", ["a:b/page.py", "a:b.py", "#?%20.py"])
def test_a_path_may_hold_any_character(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(PAGE)
    assert configuration.load_config(str(path)).decoder.num_steps == 800
    assert configuration.load_config(f"{path}:tiny").decoder.num_steps == 8
    with pytest.raises(UserError, match=f"no config '{tmp_path}/a:b/nothing.py'"):
        configuration.load_config(f"{tmp_path}/a:b/nothing.py")
