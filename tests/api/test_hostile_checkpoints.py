"""Numbers of a stranger's checkpoint are refused in one sentence, or make a model that can be stored."""

import contextlib
import dataclasses
import json
import pathlib
import sys

import pytest

from rag_mm.api import importing
from rag_mm.core import files
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny
import tiny_tokenizers

VALUES = ("0", "-1", "1000000", str(2**63), "1e300", '"x"', "[[1]]", "{}", "true")
# What the reader of JSON refuses whatever the key is; see tests/core/test_json.py.
UNREADABLE = ("NaN", "1e400", "9" * 400, "[" * 3000 + "]" * 3000)


def checkpoint(folder, name):
    if name in tiny.CHECKPOINTS:
        return tiny.write(folder, name)
    return tiny_tokenizers.write(folder, name)


def paths(values, prefix=()):
    """Where the values of a JSON object lie."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict) and key != "vocabulary_map":
            yield from paths(value, (*prefix, key))


def with_value(values, path, text):
    """JSON text in which the value at `path` is `text`."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "@"
    return json.dumps(copy).replace('"@"', text)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "llama"),
        pytest.param("clip", "clip", marks=pytest.mark.slow),
        pytest.param("chameleon", "chameleon", marks=pytest.mark.slow),
        pytest.param(importing.IMAGE_TOKENIZER, "janus_vq", marks=pytest.mark.slow),
        pytest.param(importing.IMAGE_TOKENIZER, "emu3_vq", marks=pytest.mark.slow),
    ],
)
def test_any_number_in_the_config_is_refused_or_can_be_stored(tmp_path, family, name):
    folder = checkpoint(tmp_path / "a", name)
    sound = json.loads((folder / "config.json").read_text())
    importing.open_checkpoint(family, folder)
    accepted = []
    for path in paths(sound):
        for text in VALUES:
            (folder / "config.json").write_text(with_value(sound, path, text))
            with contextlib.suppress(UserError):
                opened = importing.open_checkpoint(family, folder)
                files.canonical_json(dataclasses.asdict(opened.config))
                accepted.append((path, text))
    # Settings that shape no tensor, such as a length or a name that is not read.
    assert len(accepted) < len(VALUES) * len(list(paths(sound))) / 3, accepted


@pytest.mark.parametrize("key", ["image_mean", "image_std", "rescale_factor", "size", "crop_size"])
def test_any_number_of_the_image_processor_is_refused_or_can_be_stored(tmp_path, key):
    folder = checkpoint(tmp_path / "a", "clip")
    numbers = ("NaN", "1e-320", "1e300", "0", "9" * 400)
    for text in (*VALUES, *UNREADABLE, *(f"[{n}, {n}, {n}]" for n in numbers)):
        (folder / "preprocessor_config.json").write_text(f'{{"{key}": {text}}}')
        try:
            opened = importing.open_checkpoint("clip", folder)
        except UserError:
            continue
        files.canonical_json(dataclasses.asdict(opened.config))


@pytest.mark.parametrize("value", ['"x"', "[[1]]", str(2**70), "-1", "1.5", "[1, null]", "true"])
def test_stop_tokens_that_are_no_ids_are_refused_before_anything_is_written(tmp_path, value):
    folder = checkpoint(tmp_path / "a", "llama")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match="eos_token_id"):
        importing.import_checkpoint("llama", folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["NaN", "1e400", "-Infinity"])
def test_a_number_that_is_not_finite_leaves_no_run(tmp_path, value):
    folder = checkpoint(tmp_path / "a", "llama")
    sound = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(with_value(sound, ("rms_norm_eps",), value))
    with pytest.raises(UserError, match="not a number in JSON|beyond the range"):
        importing.import_checkpoint("llama", folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
