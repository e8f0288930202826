"""In a tokenizer.json, rules that lengthen texts or search forever are refused; public ones are not."""

import base64
import json
import time

import pytest
from tokenizers import Tokenizer, models

from rag_mm.core.errors import UserError
from rag_mm.data import public_text, tokenizer_growth

# Patterns of public tokenizers: GPT-2, LLaMA 3, CLIP, DeepSeek, and a digit splitter.
PUBLIC = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"[\r\n]|\s?[A-Za-zµÀ-ÖØ]+|\s?[!-/:-~（）]+|\s+$|[一-龥ࠀ-一가-퟿]+",
    r"(\d{3})+(?!\d)|[^\s(]+\)",
)
BOMBS = (r"(a+)+$", r"(\s*x*)*", r"((a|b)+c?)*d", r"([a-z]+ ?){2,}!", r"(?:\w+\s?)+$", "x" * 5000)


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(*texts):
    data = (4).to_bytes(4, "little") + bytes(4) + b"\0".join(text.encode() for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def sequence(*rules):
    return {"normalizer": {"type": "Sequence", "normalizers": list(rules)}}


SOUND = {
    "llama": sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),
    "t5": sequence(charsmap("a", "ſt", "صلى الله عليه وسلم"), replace({"Regex": " {2,}"}, " ")),
    "word pieces": {"model": {"type": "WordPiece", "max_input_chars_per_word": 100}},
    **{f"pattern {i}": sequence(replace({"Regex": p}, "")) for i, p in enumerate(PUBLIC)},
}
HOSTILE = {
    "nine times nine": sequence(*[replace({"String": "a"}, "a" * 9)] * 9),
    "one long text": sequence(replace({"String": "a"}, "b" * 5000)),
    "between all characters": sequence(replace({"Regex": ""}, "b" * 5000)),
    "in a decoder": {"decoder": replace({"String": "a"}, "b" * 5000)},
    "in the pre-tokenizer": {
        "pre_tokenizer": {"type": "Sequence", "x": [replace({"Regex": "."}, "b" * 500)]}
    },
    "charsmap": sequence(charsmap("a", "b" * 5000)),
    "prefix": {"model": {"type": "BPE", "continuing_subword_prefix": "a" * 5000}},
    "word": {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
    **{f"pattern {i}": sequence(replace({"Regex": p}, "")) for i, p in enumerate(BOMBS)},
}


@pytest.mark.parametrize("values", SOUND.values(), ids=SOUND)
def test_rules_of_public_tokenizers_pass(values):
    tokenizer_growth.check(values, "tokenizer.json")


@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE)
def test_bombs_are_refused(values):
    with pytest.raises(UserError, match=r"^tokenizer\.json: "):
        tokenizer_growth.check(values, "tokenizer.json")


def write(folder, **parts):
    values = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
    (folder / "tokenizer.json").write_text(json.dumps(values | parts))
    return folder


def test_a_bomb_is_refused_before_the_library_sees_it(tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match="lengthen a text"):
        public_text.load_tokenizer(write(tmp_path, **HOSTILE["nine times nine"]))
    assert time.monotonic() - started < 5


def test_panics_of_the_library_are_one_sentence(tmp_path, capfd):
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[X]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {},
    }
    for number, parts in enumerate(({"post_processor": template}, {"normalizer": charsmap("a")})):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match="no readable tokenizer"):
            public_text.load_tokenizer(write(folder, **parts))
    split = {
        "type": "Split",
        "pattern": {"Regex": "(?:a|aa)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "regex").mkdir()
    tokenizer = public_text.load_tokenizer(write(tmp_path / "regex", pre_tokenizer=split))
    with pytest.raises(UserError, match="cannot read 'aaa"):
        tokenizer.encode_text("a" * 60 + "b")
    capfd.readouterr()  # The library prints its panics.


def test_a_text_without_end_is_refused(tmp_path):
    tokenizer = public_text.load_tokenizer(write(tmp_path))
    with pytest.raises(UserError, match="at most"):
        tokenizer.encode_text("a" * (public_text.MAX_TEXT + 1))
