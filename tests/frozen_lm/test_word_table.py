"""The words of a language model and their vectors, from each form in which it may be stored."""

import json
import pathlib
import sys

import numpy as np
import pytest

from rag_mm.api import importing
from rag_mm.convert import shards
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import word_table

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "convert"))
import tiny_gguf


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A GGUF file, the run and the checkpoint folder of one model, and its table."""
    place = tmp_path_factory.mktemp("words")
    values = tiny_gguf.config(tie_word_embeddings=True)
    tensors = tiny_gguf.draw(values)
    tiny_gguf.write(place / "a.gguf", tensors, values)
    importing.import_gguf(place / "a.gguf", place / "run")
    (place / "folder").mkdir()
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    shards.write_folder(place / "folder", shapes, tensors.__getitem__, 1 << 30)
    (place / "folder" / "config.json").write_text(json.dumps(values))
    source = place / "run" / "language_model" / "frozen" / "tokenizer.json"
    (place / "folder" / "tokenizer.json").write_bytes(source.read_bytes())
    return place, tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize("form", ["a.gguf", "run", "folder"])
def test_words_and_vectors(stored, form):
    place, table = stored
    words, vectors = word_table.read_words(place / form)
    assert vectors.dtype == np.float32 and len(words) == len(vectors)
    np.testing.assert_array_equal(vectors, table)
    at = tiny_gguf.TOKENS.index
    assert words[at("Ġcat")] == " cat" and words[at("ow")] == "ow" and words[0] == "<|end|>"
    assert words[at("Ġ")] == " "


def test_a_model_without_words_is_refused(stored, tmp_path):
    place, table = stored
    shapes = {"lm_head.bias": (table.dtype, table.shape)}
    shards.write_folder(tmp_path, shapes, lambda name: table, 1 << 30)
    with pytest.raises(UserError, match="has no tokenizer"):
        word_table.read_words(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((place / "folder" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="has no embedding table"):
        word_table.read_words(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        word_table.read_words(tmp_path / "absent")
