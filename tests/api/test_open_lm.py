"""Frozen language models by address."""

import pathlib
import sys

import pytest

from rag_mm.api import importing
from rag_mm.api.open_lm import open_lm
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm.endpoint import Endpoint
from rag_mm.frozen_lm.language_model import LanguageModel

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny


def imported(place, name):
    family = tiny.CHECKPOINTS[name][0]
    importing.import_checkpoint(family, tiny.write(place / "a", name), place / "run")
    return str(place / "run")


def test_an_imported_llama_in_a_dtype(tmp_path):
    model = open_lm(imported(tmp_path, "llama_tied"), dtype="float16")
    assert isinstance(model, LanguageModel) and model.config.dtype == "float16"
    with pytest.raises(UserError, match="without a tokenizer"):
        model.score(["a"], ["b"])


def test_an_endpoint_by_its_url_and_model():
    model = open_lm("https://127.0.0.1:9/v1#a/b%20c")
    assert isinstance(model, Endpoint)
    assert (model.url, model.model) == ("https://127.0.0.1:9/v1", "a/b c")


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no language model"):
        open_lm(imported(tmp_path, "clip"))
    with pytest.raises(UserError, match="is not a run"):
        open_lm(str(tmp_path / "absent"))
