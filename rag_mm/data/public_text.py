"""Text tokenizers of public checkpoints: any tokenizer.json, or CLIP's BPE from vocab.json and merges.txt."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import tokenizer_growth

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FILES = (TOKENIZER, VOCABULARY, MERGES)
MAX_TEXT = 1 << 20
"""Longer texts, in characters, are not tokenized."""
_PROBE = "a 1"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIALS = f"{re.escape(_START)}|{re.escape(_END)}"
_CLIP_WORDS = _SPECIALS + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True, eq=False)
class PublicTokenizer:
    """The text tokenizer that a public checkpoint was trained with."""

    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def size(self) -> int:
        """The highest text id plus one; special tokens that were added later are not counted."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)

    def encode_text(self, text: str) -> list[int]:
        """Encodes a text, with the special tokens that the tokenizer puts around it.

        Raises:
            UserError: the text is not valid Unicode (it holds a lone surrogate), or too long.
        """
        return self._encode(text).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_text`; also the number of the text's characters up to the end of each token.

        Special tokens around the text end at 0.
        """
        encoding = self._encode(text)
        return encoding.ids, [end for _, end in encoding.offsets]

    def encode_within(self, text: str, length: int) -> list[int]:
        """As `encode_text`, but the text is cut where there would be more than `length` ids.

        Special tokens around the text are kept.
        """
        encoding = self._encode(text, add_special_tokens=False)
        encoding.truncate(max(length - self.tokenizer.num_special_tokens_to_add(False), 0))
        return self.tokenizer.post_process(encoding).ids

    def _encode(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"The text {text[:40]!r} is not valid Unicode.") from None
        if len(text) > MAX_TEXT:
            raise UserError(
                f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are read."
            )
        with _no_panic(f"The tokenizer cannot read {text[:40]!r}"):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Decodes ids without special tokens; CLIP's end-of-word markers become spaces."""
        with _no_panic("The tokenizer cannot decode these ids"):
            text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text

    def token_texts(self, size: int) -> tuple[str, ...]:
        """The text of each id below `size` inside a text, where a word begins with its space.

        A special token's is its name; an id without a token has an empty one.
        """
        # At the start of a text, decoders drop the first space.
        anchor = self.tokenizer.encode("a", add_special_tokens=False).ids
        start = self.tokenizer.decode(anchor, skip_special_tokens=False)
        pairs = [[*anchor, i] for i in range(size)]
        texts = self.tokenizer.decode_batch(pairs, skip_special_tokens=False)
        return tuple(text.removeprefix(start) for text in texts)

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decodes ids that follow a prompt.

        Unlike at the start of a text, where decoders drop it, the space before the first word is kept.
        """
        before = self.decode_text(prompt)
        whole = self.decode_text([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode_text(ids)


def load_tokenizer(folder: epath.PathLike) -> PublicTokenizer | None:
    """Loads the tokenizer of a folder; None if it has none.

    Reads tokenizer.json if it exists, else vocab.json and merges.txt as CLIP's.

    Raises:
        UserError: a file is damaged, or only one of vocab.json and merges.txt exists.
    """
    folder = epath.Path(folder)
    if (folder / TOKENIZER).exists():
        tokenizer_growth.check(files.read_object(folder / TOKENIZER), str(folder / TOKENIZER))
    try:
        with _no_panic(f"{folder} has no readable tokenizer"):
            return _load(folder)
    except UserError:
        raise
    except Exception as error:  # The library raises bare exceptions.
        raise UserError(f"{folder} has no readable tokenizer ({error}).") from error


def _load(folder: epath.Path) -> PublicTokenizer | None:
    if (folder / TOKENIZER).exists():
        return from_json(files.read_bytes(folder / TOKENIZER).decode())
    present = [(folder / name).exists() for name in (VOCABULARY, MERGES)]
    if not any(present):
        return None
    if not all(present):
        raise UserError(f"{folder} has only one of {VOCABULARY} and {MERGES}.")
    merges = files.read_bytes(folder / MERGES).decode().splitlines()
    lines = [line.split() for line in merges if line and not line.startswith("#version")]
    pairs = [(first, second) for first, second in lines]
    return PublicTokenizer(make_clip_bpe(files.read_object(folder / VOCABULARY), pairs))


def from_json(text: str) -> PublicTokenizer:
    """The tokenizer of a tokenizer.json's content; raises what its library does."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with contextlib.suppress(
        Exception
    ):  # A template without its token panics, at the first text only.
        tokenizer.encode(_PROBE)
    return PublicTokenizer(tokenizer)


def fold_case(tokenizer: PublicTokenizer) -> PublicTokenizer:
    """The same tokenizer, changed to read texts in lower case, as SigLIP 2 was trained."""
    inner = tokenizer.tokenizer
    lower = normalizers.Lowercase()
    both = [lower] if inner.normalizer is None else [lower, inner.normalizer]
    inner.normalizer = normalizers.Sequence(both)
    return tokenizer


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turns a panic of the library, which is no Exception, into a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: its library failed ({str(error)[:100]}).") from None


def make_clip_bpe(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]
) -> tokenizers.Tokenizer:
    """CLIP's tokenizer (Radford et al. 2021, section 2.4): lower case, words end with `</w>`."""
    model = models.BPE(
        vocab=vocabulary,
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=_END,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_START, _END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]),
        (_START, vocabulary[_START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer
