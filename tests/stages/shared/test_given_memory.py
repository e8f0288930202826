"""A memory that a run is given: used where it lies, with the codes of the run's own image tokenizer."""

import types

import numpy as np
import pytest
from etils import epath

from rag_mm.core import files
from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.memory.writing import writer
from rag_mm.stages import chain_config
from rag_mm.stages.shared import (
    given_memory,
    given_models,
    train_retriever,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def encoder(tiny_run):
    return train_retriever.load_encoder(tiny_run.workdir)


@pytest.fixture(scope="module")
def own_tokenizer(tiny_run):
    return train_tokenizer.load_tokenizer(tiny_run.workdir)


@pytest.fixture(scope="module")
def other_tokenizer(own_tokenizer, tmp_path_factory):
    """The same codes under another fingerprint."""
    folder = epath.Path(tmp_path_factory.mktemp("other"))
    text = own_tokenizer.vocabulary
    more = type(text)(text.tokenizer, text.codebook_size, text.num_sentinels + 1)
    given_models.copy_tokenizer(own_tokenizer.folder, folder, own_tokenizer.config, more)
    return train_tokenizer.load_tokenizer(folder)


def test_codes_are_computed_only_where_the_memory_lacks_them(
    tiny_run, encoder, own_tokenizer, other_tokenizer, tmp_path
):
    own = Memory.open(tiny_run.workdir / "memory").codes
    for name, tokenizer in (("own", own_tokenizer), ("other", other_tokenizer)):
        folder = epath.Path(tmp_path) / name
        folder.mkdir()
        memory = given_memory.take(tiny_run.workdir, None, encoder, tokenizer, folder)
        assert (folder / given_memory.CODES).exists() == (name == "other")
        np.testing.assert_array_equal(memory.codes, own)
        np.testing.assert_array_equal(given_memory.open_recorded(folder, encoder).codes, own)
        rows = np.array([[0, 3], [len(own) - 1, 3]])
        np.testing.assert_array_equal(memory.read_codes(rows), own[rows])


def test_the_recorded_version_is_opened_and_a_later_one_for_inference(
    tiny_run, encoder, other_tokenizer, tmp_path
):
    folder = epath.Path(tmp_path)
    first = given_memory.take(tiny_run.workdir / "memory", 1, encoder, other_tokenizer, folder)
    whole = Memory.open(tiny_run.workdir / "memory")
    assert len(first) < len(whole) and len(given_memory.open_recorded(folder, encoder)) == len(
        first
    )
    newest = given_memory.open_newest(folder, encoder, other_tokenizer)
    assert len(newest) == len(whole)
    rows = np.array([[len(whole) - 1, -1]])
    codes = newest.read_codes(rows)  # Neither in the memory nor in the run.
    np.testing.assert_array_equal(codes[0, 0], whole.codes[-1])
    assert (codes[0, 1] == -1).all()
    rules = policy.Rules(max_equal_codes=0.5)
    assert rules.bounds(newest.read_codes)["equal_codes"].read_rows is newest.read_codes


def test_another_memory_in_its_place_is_refused(tiny_run, encoder, own_tokenizer, tmp_path):
    folder = epath.Path(tmp_path)
    given_memory.take(tiny_run.workdir, None, encoder, own_tokenizer, folder)
    record = files.read_object(folder / given_memory.RECORD)
    for change, says in (
        ({"fingerprint": "0"}, "is not the memory that .* was given"),
        ({"version": 9}, "has no version 9"),
        ({"folder": "a\0b"}, "is not a memory"),
        ({"folder": "\ud800"}, "is not a memory"),
        ({"folder": "."}, "is not a memory"),
        ({"folder": str(tmp_path / "absent")}, "is not a memory"),
    ):
        files.write_json(folder / given_memory.RECORD, record | change)
        with pytest.raises(UserError, match=says):
            given_memory.open_recorded(folder, encoder)
    with pytest.raises(UserError, match=f"was given its memory, too; give {tmp_path / 'absent'}"):
        given_memory.find(folder)


@pytest.mark.parametrize("damage", [lambda x: x[1:], lambda x: x + 0.5, lambda x: x.ravel()])
def test_codes_that_are_not_those_of_all_rows_are_refused(
    tiny_run, encoder, other_tokenizer, tmp_path, damage
):
    folder = epath.Path(tmp_path)
    memory = given_memory.take(tiny_run.workdir, None, encoder, other_tokenizer, folder)
    files.write_array(folder / given_memory.CODES, damage(memory.codes))
    with pytest.raises(UserError, match="is damaged; train the stage memory again"):
        given_memory.open_recorded(folder, encoder)


def test_what_training_cannot_read_is_refused(tiny_run, encoder, own_tokenizer, tmp_path):
    folder = epath.Path(tmp_path)
    stranger = types.SimpleNamespace(fingerprint="another", image_batch=1)
    with pytest.raises(
        UserError, match=r"another retriever .* --config\.retriever\.folder=.*/retr"
    ):
        given_memory.take(tiny_run.workdir, None, stranger, own_tokenizer, folder)
    texts = [Document(id=str(i), segments=(Text(f"text {i}"),)) for i in range(3)]
    options = writer.Options(index="exact")
    Memory.build(tmp_path / "texts", texts, encoder, options=options)
    with pytest.raises(UserError, match="3 of the 3 documents of .* have no image"):
        given_memory.take(tmp_path / "texts", None, encoder, own_tokenizer, folder)
    assert not (folder / given_memory.RECORD).exists()


def test_what_needs_the_facts_of_its_rows_is_refused(tiny_run):
    given = {"memory.folder": str(tiny_run.workdir)}
    page = chain_config.load("configs/quickstart.py:tiny", given)
    with pytest.raises(
        UserError, match="The stage generation needs the facts of the memory's rows"
    ):
        chain_config.stage_configs(page)
    page["stages"] = page["stages"][:5]
    assert page["stages"][-1] == "decoder"
    page["neighbors"]["min_same_class"] = 0.5
    with pytest.raises(UserError, match=r"neighbors\.min_same_class needs the facts"):
        chain_config.stage_configs(page)
    page["neighbors"]["min_same_class"] = 0.0
    fingerprint = chain_config.stage_configs(page)["memory"].folder_fingerprint
    assert fingerprint == Memory.open(tiny_run.workdir / "memory").fingerprint
    page["memory"]["version"] = 1
    assert chain_config.stage_configs(page)["memory"].folder_fingerprint != fingerprint
    page["memory"]["folder"] = None
    with pytest.raises(UserError, match="version is that of a given memory"):
        chain_config.stage_configs(page)
