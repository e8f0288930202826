"""The tokenizer in a GGUF file's metadata as a tokenizer.json: byte-level BPE as of GPT-2."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from rag_mm.core.errors import UserError

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
# How a text is divided into words before the merges, by llama.cpp's name of the rule.
_PLAIN = ("gpt-2",)
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_KEY = "tokenizer.ggml."


def make_json(path: epath.Path, values: Mapping[str, Any]) -> str | None:
    """The content of tokenizer.json; None if the file has no tokenizer.

    Raises:
        UserError: the tokenizer is damaged or of another kind.
    """
    kind = values.get(_KEY + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind != "gpt2":
        raise UserError(
            f"{path} has a tokenizer of the kind {str(kind)[:40]!r}; byte-level BPE ('gpt2') is read. Import "
            "the model's Hugging Face folder instead."
        )
    words = values.get(_KEY + "pre")
    if words not in _PLAIN + _SINGLE_DIGITS + _LLAMA3:
        known = ", ".join(_PLAIN + _SINGLE_DIGITS + _LLAMA3[:1])
        raise UserError(
            f"{path} divides texts into words by the rule {str(words)[:40]!r} (tokenizer.ggml.pre); the "
            f"rules that are known are {known}. Import the model's Hugging Face folder instead."
        )
    try:
        return _make(values, str(words)).to_str()
    except Exception as error:  # The library raises bare exceptions.
        raise UserError(f"{path} has no readable tokenizer ({str(error)[:100]}).") from error


def _make(values: Mapping[str, Any], words: str) -> tokenizers.Tokenizer:
    tokens, kinds = values[_KEY + "tokens"], values.get(_KEY + "token_type")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError("a token has two ids")
    pairs = [merge.split(" ") for merge in values[_KEY + "merges"]]
    merges = [(left, right) for left, right in pairs]
    is_llama3 = words in _LLAMA3
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=is_llama3))
    tokenizer.pre_tokenizer = _pre_tokenizer(words)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds or [], strict=bool(kinds)):
        if kind in (_CONTROL, _USER_DEFINED):
            is_special = kind == _CONTROL
            added = tokenizers.AddedToken(token, special=is_special, normalized=False)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    around = [values.get(f"{_KEY}add_{end}_token") for end in ("bos", "eos")]
    starts = is_llama3 if around[0] is None else around[0]
    special = {}
    for end, is_added in (("bos", starts), ("eos", around[1])):
        if is_added:
            token_id = values[f"{_KEY}{end}_token_id"]
            special[end] = tokens[token_id], token_id
    if special:
        names = {end: name for end, (name, _) in special.items()}
        template = [names.get("bos"), "$A", names.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in template if part], special_tokens=list(special.values())
        )
    return tokenizer


def _pre_tokenizer(words: str) -> pre_tokenizers.PreTokenizer:
    if words in _LLAMA3:
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, as_bytes])
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words in _PLAIN:
        return as_bytes
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_bytes])


def stop_tokens(path: epath.Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text or a turn, without repetitions.

    Raises:
        UserError: one is no integer from 0.
    """
    found = [values.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = [each for each in found if each is not None]
    if any(type(each) is not int or each < 0 for each in ids):
        raise UserError(f"{path}: the ids that end a text are {str(ids)[:40]}; give ids from 0.")
    return tuple(dict.fromkeys(ids))
