"""One vocabulary for text, special tokens and image codes (see docs/papers/ra_cm3.md).

Text is encoded by a byte-level BPE. Its 256 byte tokens are the fallback for anything not seen in training,
so every Unicode string is decoded exactly. The ids of special tokens and codes are unknown to the text
tokenizer, so no text can produce one.
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
# Settings of a public BPE that change its pieces.
_NOT_PLAIN = (
    "dropout",
    "ignore_merges",
    "byte_fallback",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids `[0, size)`: text, pad, eod, brk, eoss, sentinels, size tokens, codes, in this order.

    Attributes:
        tokenizer: byte-level BPE of the text ids; it has no special tokens.
        codebook_size: number of image codes.
        num_sentinels: number of sentinels, which stand for masked spans.
        folds_case: whether texts are encoded without their case, as a text encoder reads them; else every
            text is decoded exactly.
        image_sizes: heights in pixels of square images of several sizes; the token of its size stands before
            the codes of each. Empty: all images have one size, and no such token.
    """

    tokenizer: tokenizers.Tokenizer
    codebook_size: int
    num_sentinels: int
    folds_case: bool = False
    image_sizes: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("codebook_size", "num_sentinels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}; give an integer of at least 1.")
        if len(set(self.image_sizes)) != len(self.image_sizes):
            raise UserError(f"image_sizes are {self.image_sizes}; give each size once.")

    @functools.cached_property
    def text_size(self) -> int:
        """Number of text ids, including the 256 byte tokens."""
        return self.tokenizer.get_vocab_size()

    @property
    def pad(self) -> int:
        """Pads the end of a sequence."""
        return self.text_size

    @property
    def eod(self) -> int:
        """End of document: begins and ends a sequence."""
        return self.text_size + 1

    @property
    def brk(self) -> int:
        """Break: separates text from image, and documents from each other."""
        return self.text_size + 2

    @property
    def eoss(self) -> int:
        """End of span: ends a span that masking moved."""
        return self.text_size + 3

    def sentinel(self, i: int) -> int:
        """The sentinel id of masked span `i`; ValueError outside `[0, num_sentinels)`."""
        if not 0 <= i < self.num_sentinels:
            raise ValueError(f"sentinel {i} does not exist; there are {self.num_sentinels}")
        return self.text_size + _NUM_SPECIALS + i

    def size_token(self, image_size: int | None) -> int:
        """The id before the codes of an image of a size in pixels; None: of the first size.

        Raises:
            UserError: the vocabulary does not have the size.
        """
        if image_size is None:
            image_size = self.image_sizes[0]
        if image_size not in self.image_sizes:
            known = ", ".join(map(str, self.image_sizes)) or "one, which has no token"
            raise UserError(f"The image size {image_size} is none of the model's; give {known}.")
        first = self.text_size + _NUM_SPECIALS + self.num_sentinels
        return first + self.image_sizes.index(image_size)

    @property
    def code_offset(self) -> int:
        """First code id: code `c` of the codebook has the id `code_offset + c`."""
        return self.text_size + _NUM_SPECIALS + self.num_sentinels + len(self.image_sizes)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.code_offset + self.codebook_size

    def encode_text(self, text: str) -> list[int]:
        """Encodes a text; the result may be empty.

        Raises:
            UserError: the text is not valid Unicode (it holds a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text {text[:40]!r} is not valid Unicode at character {error.start};"
                " remove the lone surrogate."
            ) from None
        return self.tokenizer.encode(text.casefold() if self.folds_case else text).ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """Decodes text ids; bytes that are not valid UTF-8, which a model can generate, become U+FFFD.

        Raises:
            ValueError: an id is not a text id.
        """
        ids = [int(i) for i in ids]
        invalid = [i for i in ids if not 0 <= i < self.text_size]
        if invalid:
            raise ValueError(f"{invalid[0]} is not a text id; text ids are below {self.text_size}")
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of everything that determines the meaning of an id."""
        return files.digest(files.canonical_json(self._describe()).encode())

    def save(self, path: epath.PathLike) -> None:
        """Writes the vocabulary as JSON, atomically."""
        files.write_json(path, self._describe())

    def _describe(self) -> dict[str, Any]:
        model = json.loads(self.tokenizer.to_str())["model"]
        # Absent from earlier files, whose fingerprints stay.
        added: dict[str, Any] = {"folds_case": True} if self.folds_case else {}
        if self.image_sizes:
            added["image_sizes"] = list(self.image_sizes)
        return added | {
            "format": _FORMAT,
            "codebook_size": self.codebook_size,
            "num_sentinels": self.num_sentinels,
            "tokens": sorted(model["vocab"], key=model["vocab"].__getitem__),
            "merges": [list(merge) for merge in model["merges"]],
        }


def train_vocabulary(
    texts: Iterable[str],
    vocab_size: int,
    codebook_size: int,
    num_sentinels: int,
    image_sizes: Sequence[int] = (),
) -> Vocabulary:
    """Trains the text BPE; the result does not depend on the order of `texts`.

    Args:
        texts: training texts.
        vocab_size: maximum number of text ids, at least 256; little text gives fewer.
        codebook_size: number of image codes.
        num_sentinels: number of sentinels, at least the maximum number of masked spans per sequence.
        image_sizes: see `Vocabulary`.

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
    return Vocabulary(tokenizer, codebook_size, num_sentinels, image_sizes=tuple(image_sizes))


def load_vocabulary(path: epath.PathLike) -> Vocabulary:
    """Reads what `Vocabulary.save` wrote.

    Raises:
        UserError: the file is missing, incomplete or inconsistent.
    """
    described = files.read_json(path)
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise UserError(f"{path} is not a vocabulary of this version ({_FORMAT!r}).")
    try:
        tokens, merges = described["tokens"], described["merges"]
        # The byte tokens come first, then the results of the merges, in order.
        if tokens != _alphabet() + list(dict.fromkeys(left + right for left, right in merges)):
            raise ValueError("its tokens are not the 256 byte tokens and the results of its merges")
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m) for m in merges])
        sizes = described["codebook_size"], described["num_sentinels"]
        return Vocabulary(
            _make_tokenizer(bpe),
            *sizes,
            folds_case=described.get("folds_case") is True,
            image_sizes=tuple(described.get("image_sizes", ())),
        )
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path} is damaged ({error}); build the vocabulary again.") from error


def read_text_tokenizer(path: epath.PathLike) -> tokenizers.Tokenizer:
    """The byte-level BPE in a file: of a `Vocabulary`, or a public tokenizer.json of GPT-2's kind.

    A text gets the same pieces as from the public one. Their ids are the 256 bytes and then the results of
    the merges in order, as GPT-2's are; its special tokens are left out.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    described = files.read_json(path)
    if isinstance(described, dict) and described.get("format") == _FORMAT:
        return load_vocabulary(path).tokenizer
    values = described if isinstance(described, dict) else {}
    model, words = (values.get(key) or {} for key in ("model", "pre_tokenizer"))
    try:
        is_plain = not values.get("normalizer") and not any(model.get(key) for key in _NOT_PLAIN)
        is_bytes = words.get("type") == "ByteLevel" and words.get("use_regex", True)
        if model.get("type") != "BPE" or not is_plain or not is_bytes or words["add_prefix_space"]:
            raise UserError(
                f"{path} is no byte-level BPE as GPT-2's, the only kind of text tokenizer that is supported."
            )
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        merges = [(left, right) for left, right in pairs]
        tokens = [*_alphabet(), *(left + right for left, right in merges)]
        ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        return _make_tokenizer(models.BPE(ids, merges))
    except UserError:
        raise
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path} is damaged ({error}); give another text tokenizer.") from error


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _make_tokenizer(bpe: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
