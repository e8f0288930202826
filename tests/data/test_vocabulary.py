"""Text survives exactly, ids are disjoint, and no text can spell a special token."""

import dataclasses
import json
import pathlib

import fresh_python
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core.errors import UserError
from rag_mm.data import vocabulary as vocabulary_lib

TEXTS = ["red apple at the top left on a blue background", "green pear at the center"] * 3


def make_vocabulary(**changes):
    sizes = {"vocab_size": 320, "codebook_size": 64, "num_sentinels": 8} | changes
    return vocabulary_lib.train_vocabulary(TEXTS, **sizes)


VOCABULARY = make_vocabulary()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  b ",
        "\n\r\n\t",
        "👨‍👩‍👧 né \x00\u2028",
        "נמר 虎 🇨🇭",
        "red apple",
        "x" * 10_000,
    ],
)
def test_text_survives_exactly(text):
    assert VOCABULARY.decode_text(VOCABULARY.encode_text(text)) == text


@given(st.text())
def test_any_text_survives_exactly(text):
    assert VOCABULARY.decode_text(VOCABULARY.encode_text(text)) == text


@pytest.mark.parametrize(
    "text", ["<pad>", "<0x41>", "<sentinel:0>", "<eoss><eod>", "</s>", "[PAD]"]
)
def test_no_text_spells_a_special_token(text):
    hostile = vocabulary_lib.train_vocabulary([text] * 9, 300, 64, 8)
    for vocabulary in (VOCABULARY, hostile):
        ids = vocabulary.encode_text(text)
        assert all(0 <= i < vocabulary.text_size for i in ids)
        assert vocabulary.decode_text(ids) == text


def test_ids_are_disjoint_and_fill_the_range():
    v = VOCABULARY
    specials = [v.pad, v.eod, v.brk, v.eoss] + [v.sentinel(i) for i in range(v.num_sentinels)]
    codes = range(v.code_offset, v.code_offset + v.codebook_size)
    assert [*range(v.text_size), *specials, *codes] == list(range(v.size))
    with pytest.raises(ValueError, match="sentinel 8"):
        v.sentinel(8)


def test_training_learns_words_and_keeps_all_bytes():
    assert len(VOCABULARY.encode_text("red apple")) < len("red apple")
    assert 256 < VOCABULARY.text_size <= 320
    assert vocabulary_lib.train_vocabulary([], 256, 64, 8).text_size == 256


def test_training_is_deterministic_even_in_another_process(tmp_path):
    VOCABULARY.save(tmp_path / "here.json")
    program = pathlib.Path(__file__).parent / "programs" / "train_vocabulary.py"
    environment = fresh_python.environment() | {"PYTHONHASHSEED": "7"}
    fresh_python.run(program, tmp_path / "there.json", *TEXTS[::-1], env=environment, check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_loading_gives_the_same_vocabulary(tmp_path):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    loaded = vocabulary_lib.load_vocabulary(tmp_path / "vocabulary.json")
    assert loaded.fingerprint == VOCABULARY.fingerprint
    assert loaded.size == VOCABULARY.size
    for text in ("green apple", "  ünseen 🍐 "):
        assert loaded.encode_text(text) == VOCABULARY.encode_text(text)
        assert loaded.decode_text(loaded.encode_text(text)) == text


def test_a_text_encoders_vocabulary_reads_no_case(tmp_path):
    folded = dataclasses.replace(VOCABULARY, folds_case=True)
    for text in ("Red Apple", "RED APPLE", "red apple"):
        assert folded.encode_text(text) == VOCABULARY.encode_text("red apple")
    assert VOCABULARY.encode_text("Red Apple") != VOCABULARY.encode_text("red apple")
    folded.save(tmp_path / "folded.json")
    loaded = vocabulary_lib.load_vocabulary(tmp_path / "folded.json")
    assert loaded.folds_case and loaded.fingerprint == folded.fingerprint != VOCABULARY.fingerprint


def test_a_file_from_before_case_was_folded_keeps_case(tmp_path):
    VOCABULARY.save(tmp_path / "earlier.json")
    assert "folds_case" not in json.loads((tmp_path / "earlier.json").read_text())
    assert not vocabulary_lib.load_vocabulary(tmp_path / "earlier.json").folds_case


def test_the_fingerprint_sees_every_part():
    other_text = vocabulary_lib.train_vocabulary(["blue plum"] * 3, 320, 64, 8)
    others = [make_vocabulary(codebook_size=65), make_vocabulary(num_sentinels=9), other_text]
    assert len({v.fingerprint for v in (VOCABULARY, *others)}) == 4


def _foreign_files():
    good = VOCABULARY._describe()
    yield "[]"
    yield "not json"
    yield json.dumps({"model": {"type": "BPE"}})
    yield json.dumps(good | {"format": "rag_mm vocabulary 99"})
    yield json.dumps({k: v for k, v in good.items() if k != "merges"})
    yield json.dumps(good | {"codebook_size": True})
    yield json.dumps(good | {"num_sentinels": -1})
    yield json.dumps(good | {"tokens": good["tokens"][1:]})
    yield json.dumps(good | {"tokens": [*good["tokens"], "<pad>"]})
    yield json.dumps(good | {"merges": good["merges"][1:]})
    yield json.dumps(good | {"merges": [["nowhere", "x"], *good["merges"]]})
    yield json.dumps(good | {"merges": [["a"]]})


@pytest.mark.parametrize("content", list(_foreign_files()))
def test_a_foreign_or_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        vocabulary_lib.load_vocabulary(path)


def _public(folder, add_prefix_space=False):
    """A public byte-level BPE, its special token first, and its file."""
    public = tokenizers.Tokenizer(tokenizers.models.BPE())
    public.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    public.train_from_iterator(["a red kite over a red lake"] * 3, trainer)
    public.save(str(folder / "tokenizer.json"))
    return public, folder / "tokenizer.json"


def test_a_public_byte_level_bpe_gives_the_same_pieces(tmp_path):
    public, path = _public(tmp_path)
    taken = vocabulary_lib.Vocabulary(vocabulary_lib.read_text_tokenizer(path), 64, 8)
    for text in ("a red kite over a lake", "Überraschung 🍎!", "it's <|not special|>", ""):
        ids = taken.encode_text(text)
        assert [taken.tokenizer.id_to_token(i) for i in ids] == public.encode(text).tokens
        assert taken.decode_text(ids) == text
    assert len(taken.encode_text(" red lake")) == 2  # The merges are there.
    assert taken.text_size == public.get_vocab_size() - 1  # Its special token is left out.
    taken.save(tmp_path / "vocabulary.json")
    again = vocabulary_lib.read_text_tokenizer(tmp_path / "vocabulary.json")
    assert again.to_str() == taken.tokenizer.to_str()


def test_a_public_tokenizer_of_another_kind_is_refused(tmp_path):
    _, path = _public(tmp_path)
    good = json.loads(path.read_text())
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": good["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": good["model"] | {"type": "Unigram"}},
        {"model": good["model"] | {"end_of_word_suffix": "</w>"}},
        {"model": good["model"] | {"byte_fallback": True}},
        {"model": good["model"] | {"merges": [["a"]]}},
        {"model": good["model"] | {"merges": [["nowhere", "x"]]}},
        {"model": 3},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=r"tokenizer\.json") as raised:
            vocabulary_lib.read_text_tokenizer(path)
        assert "\n" not in str(raised.value)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        vocabulary_lib.load_vocabulary(tmp_path / "vocabulary.json")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="255"):
        make_vocabulary(vocab_size=255)
    with pytest.raises(UserError, match="codebook_size is 0"):
        make_vocabulary(codebook_size=0)
    with pytest.raises(UserError, match="lone surrogate"):
        VOCABULARY.encode_text("broken \ud83d")
    with pytest.raises(ValueError, match="not a text id"):
        VOCABULARY.decode_text([0, VOCABULARY.pad])
    assert "\ufffd" in VOCABULARY.decode_text(VOCABULARY.encode_text("é")[:1])


def test_each_image_size_has_a_token_between_sentinels_and_codes(tmp_path):
    sized = make_vocabulary(image_sizes=(32, 16))
    first = VOCABULARY.code_offset
    assert (sized.size_token(32), sized.size_token(16)) == (first, first + 1)
    assert sized.size_token(None) == first
    assert (sized.code_offset, sized.size) == (first + 2, VOCABULARY.size + 2)
    assert sized.fingerprint != VOCABULARY.fingerprint
    sized.save(tmp_path / "sized.json")
    loaded = vocabulary_lib.load_vocabulary(tmp_path / "sized.json")
    assert loaded.fingerprint == sized.fingerprint and loaded.image_sizes == (32, 16)
    for vocabulary, size in ((sized, 8), (VOCABULARY, 32)):
        with pytest.raises(UserError, match=f"size {size} is none"):
            vocabulary.size_token(size)
    with pytest.raises(UserError, match="each size once"):
        make_vocabulary(image_sizes=(32, 32))
