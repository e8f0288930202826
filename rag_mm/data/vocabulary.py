"""One shared id space: byte-level BPE text, then specials, then image codes (RA-CM3, section 2).

Text goes through a byte-level BPE, whose 256 byte tokens are the fallback for whatever training
did not see, so every Unicode string comes back exactly. Specials and codes are numbers that the
text tokenizer has never heard of: no text, however it is spelled, can produce one.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from rag_mm.core import files
from rag_mm.core.errors import UserError

_FORMAT = "rag_mm vocabulary 1"
_NUM_SPECIALS = 4  # pad, eod, brk, eoss; the sentinels follow them.


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids `[0, size)`: text, pad, eod, brk, eoss, sentinels, codes, in this order.

    Attributes:
        tokenizer: byte-level BPE of the text part; it holds no special token.
        codebook_size: number of image codes.
        num_sentinels: number of sentinels, which name masked spans.
    """

    tokenizer: tokenizers.Tokenizer
    codebook_size: int
    num_sentinels: int

    def __post_init__(self):
        for name in ("codebook_size", "num_sentinels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}; give a whole number of at least 1.")

    @functools.cached_property
    def text_size(self) -> int:
        """Number of text tokens, the 256 byte tokens included."""
        return self.tokenizer.get_vocab_size()

    @property
    def pad(self) -> int:
        """Fills the end of a row."""
        return self.text_size

    @property
    def eod(self) -> int:
        """Begins and ends a row."""
        return self.text_size + 1

    @property
    def brk(self) -> int:
        """Stands between text and image, and between documents."""
        return self.text_size + 2

    @property
    def eoss(self) -> int:
        """Ends a moved span."""
        return self.text_size + 3

    def sentinel(self, i: int) -> int:
        """The id that stands for masked span `i`; ValueError outside `[0, num_sentinels)`."""
        if not 0 <= i < self.num_sentinels:
            raise ValueError(f"sentinel {i} does not exist; there are {self.num_sentinels}")
        return self.text_size + _NUM_SPECIALS + i

    @property
    def code_offset(self) -> int:
        """Code `c` of the codebook is the token `code_offset + c`."""
        return self.text_size + _NUM_SPECIALS + self.num_sentinels

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.code_offset + self.codebook_size

    def encode_text(self, text: str) -> list[int]:
        """Text ids of `text`, possibly none.

        Raises:
            UserError: the string holds a lone surrogate, so it is not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} is not valid Unicode at character {error.start};"
                " remove the lone surrogate."
            ) from None
        return self.tokenizer.encode(text).ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of text ids; bytes that are no UTF-8, as a model may write, become U+FFFD.

        Raises:
            ValueError: an id is not a text id.
        """
        ids = [int(i) for i in ids]
        foreign = [i for i in ids if not 0 <= i < self.text_size]
        if foreign:
            raise ValueError(f"{foreign[0]} is not a text id; they are below {self.text_size}")
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of everything that decides what an id means."""
        return files.digest(files.canonical_json(self._describe()).encode())

    def save(self, path: epath.PathLike) -> None:
        """Writes the vocabulary as JSON, atomically."""
        files.write_json(path, self._describe())

    def _describe(self) -> dict[str, Any]:
        model = json.loads(self.tokenizer.to_str())["model"]
        return {
            "format": _FORMAT,
            "codebook_size": self.codebook_size,
            "num_sentinels": self.num_sentinels,
            "tokens": sorted(model["vocab"], key=model["vocab"].__getitem__),
            "merges": [list(merge) for merge in model["merges"]],
        }


def train_vocabulary(
    texts: Iterable[str], vocab_size: int, codebook_size: int, num_sentinels: int
) -> Vocabulary:
    """Learns merges from `texts`; equal texts give an equal vocabulary, in whatever order.

    Args:
        texts: training text.
        vocab_size: most text tokens to make, at least 256; little text makes fewer.
        codebook_size: number of image codes.
        num_sentinels: number of sentinels, at least the most spans that one row masks.

    Raises:
        UserError: a size is out of range.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size is {vocab_size}; the 256 byte tokens need at least 256.")
    tokenizer = _make_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # A pair seen once is not a pattern.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Vocabulary(tokenizer, codebook_size, num_sentinels)


def load_vocabulary(path: epath.PathLike) -> Vocabulary:
    """Reads what `Vocabulary.save` wrote.

    Raises:
        UserError: the file is missing, or is not a whole and consistent vocabulary.
    """
    described = files.read_json(path)
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise UserError(f"{path} is not a vocabulary of this version ({_FORMAT!r}).")
    try:
        tokens, merges = described["tokens"], described["merges"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # The byte tokens come first, the others are what the merges make, in their order.
        if tokens != alphabet + list(dict.fromkeys(left + right for left, right in merges)):
            raise ValueError("its tokens are not the 256 bytes and what its merges make")
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m) for m in merges])
        return Vocabulary(
            _make_tokenizer(bpe), described["codebook_size"], described["num_sentinels"]
        )
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path} is damaged ({error}); build the vocabulary again.") from error


def _make_tokenizer(bpe: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
