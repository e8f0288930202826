"""Tokenizers of public checkpoints match id for id: CLIP's BPE from two files, and any tokenizer.json."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hard_strings import STRINGS
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rag_mm.core.errors import UserError
from rag_mm.data import public_text

GOLDEN = pathlib.Path(__file__).parent / "golden" / "text.json"


def clip_files(folder: pathlib.Path) -> pathlib.Path:
    """vocab.json and merges.txt in the format of CLIP: bytes, word-final bytes, merges, special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        "a t</w>",
        "c at</w>",
        "p h",
        "o t",
        "ph ot",
        "phot o</w>",
        "o f</w>",
        "d o",
        "n '",
        "' t</w>",
    ]
    merges += ["i n", "w o", "r d</w>", "wo rd</w>", "Ã ©</w>", "1 2"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def llama_file(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer.json like LLaMA 3's: byte-level BPE, a begin-of-text before every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator(["a photo of a cat " * 3, "the word and the words"], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    made.enable_truncation(5)  # A file may enable truncation; we truncate texts ourselves.
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_clip_ids_match_transformers(tmp_path):
    """transformers' ids are stored in golden/; the next test checks them against the installed version."""
    text = public_text.load_tokenizer(clip_files(tmp_path))
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == len(STRINGS)
    for string, ids in zip(STRINGS, golden, strict=True):
        assert text.encode_text(string) == ids, repr(string)


@pytest.mark.parity
def test_stored_clip_ids_match_the_installed_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_files(tmp_path))
    golden = json.loads(GOLDEN.read_text())
    assert [theirs(string).input_ids for string in STRINGS] == golden
    text = public_text.load_tokenizer(tmp_path)
    for ids in golden:
        assert text.decode_text(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parity
def test_a_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = llama_file(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = public_text.load_tokenizer(folder)
    for string in STRINGS:
        ids = theirs(string, truncation=False).input_ids
        assert text.encode_text(string) == ids, repr(string)
        assert text.decode_text(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_decoding_restores_the_text(tmp_path):
    text = public_text.load_tokenizer(llama_file(tmp_path))
    for string in STRINGS:
        ids = text.encode_text(string)
        assert ids[0] == 0 and max(ids) < text.size
        assert text.decode_text(ids) == string


def test_a_missing_tokenizer_is_none_and_an_incomplete_one_is_rejected(tmp_path):
    assert public_text.load_tokenizer(tmp_path) is None
    folder = clip_files(tmp_path / "a")
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="only one of vocab.json and merges.txt"):
        public_text.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(UserError, match="no readable tokenizer"):
        public_text.load_tokenizer(folder)
    with pytest.raises(UserError, match="not valid Unicode"):
        public_text.load_tokenizer(clip_files(tmp_path / "b")).encode_text("\ud800")


if __name__ == "__main__":
    import tempfile

    import transformers

    with tempfile.TemporaryDirectory() as place:
        theirs = transformers.CLIPTokenizer.from_pretrained(clip_files(pathlib.Path(place)))
        ids = [theirs(string).input_ids for string in STRINGS]
    GOLDEN.write_text(json.dumps(ids, separators=(",", ":")) + "\n")
    print(np.sum([len(row) for row in ids]), "ids")


def test_a_continuation_keeps_the_space_before_its_first_word():
    """LLaMA 2's decoder drops the space at a text's start; "once" and " upon" are not "onceupon"."""
    words = {"<unk>": 0, "▁once": 1, "▁upon": 2, "n": 3, "<s>": 4}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    text = public_text.PublicTokenizer(made)
    assert text.decode_text([2]) == "upon"
    assert text.decode_continuation([4, 1], [2]) == " upon"
    assert text.decode_continuation([4, 1], [3, 2]) == "n upon"
    assert text.decode_continuation([4], [1, 2]) == "once upon"
    assert text.decode_continuation([4, 1], []) == ""
