"""Tokenizers of public checkpoints: any tokenizer.json, and CLIP's byte-level BPE from its two files."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rag_mm.core.errors import UserError

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FILES = (TOKENIZER, VOCABULARY, MERGES)
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIALS = f"{re.escape(_START)}|{re.escape(_END)}"
_CLIP_WORDS = _SPECIALS + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True, eq=False)
class PublicText:
    """A tokenizer as its checkpoint was trained with."""

    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def size(self) -> int:
        """One more than the highest id of text; specials that were added later do not count."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)

    def encode_text(self, text: str) -> list[int]:
        """Ids with the specials that the tokenizer puts around a text.

        Raises:
            UserError: the string holds a lone surrogate, so it is not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"The text {text[:40]!r} is not valid Unicode.") from None
        return self.tokenizer.encode(text).ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids, without specials; CLIP's ends of words become spaces."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text


def load_text(folder: epath.PathLike) -> PublicText | None:
    """The tokenizer of a folder, or None where it has none.

    tokenizer.json counts; without it vocab.json and merges.txt are read as CLIP's.

    Raises:
        UserError: a file is damaged, or one of the two is missing.
    """
    folder = epath.Path(folder)
    try:
        if (folder / TOKENIZER).exists():
            found = tokenizers.Tokenizer.from_str((folder / TOKENIZER).read_text())
            found.no_truncation()
            found.no_padding()
            return PublicText(found)
        present = [(folder / name).exists() for name in (VOCABULARY, MERGES)]
        if not any(present):
            return None
        if not all(present):
            raise UserError(f"{folder} has only one of {VOCABULARY} and {MERGES}.")
        merges = (folder / MERGES).read_text().splitlines()
        lines = [line.split() for line in merges if line and not line.startswith("#version")]
        pairs = [(first, second) for first, second in lines]
        return PublicText(make_clip_bpe(json.loads((folder / VOCABULARY).read_text()), pairs))
    except UserError:
        raise
    except Exception as error:  # The library raises bare exceptions.
        raise UserError(f"{folder} has no readable tokenizer ({error}).") from error


def make_clip_bpe(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]
) -> tokenizers.Tokenizer:
    """CLIP's tokenizer (Radford et al. 2021, section 2.4): lower case, words ended by `</w>`."""
    model = models.BPE(
        vocab=vocabulary,
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=_END,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_START, _END])
    made.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]),
        (_START, vocabulary[_START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return made
