"""The texts of an Emu: its own vocabulary, or the tokenizer of the language model that it starts from."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, Protocol

from etils import epath

from rag_mm.core import configuration, files, renames
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import public_text, vocabulary
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.shared import frozen, starting_point

_FORMAT = "rag_mm imported text 1"
_SOURCE, _CONFIG = "source", "config.json"  # Of an imported run: what came with the checkpoint.
SETTING = "emu_data.language_model"
_NUM_SPECIALS = len(dataclasses.fields(SlotTokens))


class EmuText(Protocol):
    """Texts to ids and back, without the special tokens of sequences."""

    @property
    def text_size(self) -> int:
        """All ids of texts are below."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text; UserError if it cannot be read."""
        ...

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def save(self, path: epath.PathLike) -> None:
        """Writes what `load` reads."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImportedText:
    """The tokenizer of a language model.

    Attributes:
        public: the tokenizer.
        text_size: rows of the language model's table, after which the tokens of images come.
        begin, end: ids that begin and end a sequence.
    """

    public: public_text.PublicTokenizer
    text_size: int
    begin: int
    end: int

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text inside a sequence; raises as `PublicTokenizer.encode_text`."""
        return [each for each in self.public.encode_text(text) if each not in self._around]

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and spaces around it."""
        return self.public.decode_text(ids).strip()

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer and the ids as JSON, atomically."""
        numbers = {name: getattr(self, name) for name in ("text_size", "begin", "end")}
        tokenizer = json.loads(self.public.tokenizer.to_str())
        files.write_json(path, {"format": _FORMAT, **numbers, "tokenizer": tokenizer})

    @functools.cached_property
    def _around(self) -> set[int]:
        """What the tokenizer puts around a text."""
        return {*self.public.encode_text(""), self.begin, self.end}


def load(path: epath.PathLike) -> EmuText:
    """Reads what `EmuText.save` wrote.

    Raises:
        UserError: the file is missing, or damaged.
    """
    values = files.read_object(path)
    if values.get("format") != _FORMAT:
        return vocabulary.load_vocabulary(path)
    sizes: list[Any] = [values.get(name) for name in ("text_size", "begin", "end")]
    try:
        public = public_text.from_json(json.dumps(values["tokenizer"]))
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path} is damaged ({error}); prepare the data again.") from error
    if not all(type(each) is int and each >= 0 for each in sizes):
        raise UserError(f"{path} is damaged (its sizes are {sizes}); prepare the data again.")
    return ImportedText(public, *sizes)


def slot_tokens(text: EmuText) -> SlotTokens:
    """The special ids, right after the text ids; an imported tokenizer has its own begin and end."""
    first = text.text_size
    if isinstance(text, ImportedText):
        return SlotTokens(text.begin, text.end, *range(first, first + _NUM_SPECIALS - 2))
    return SlotTokens(*range(first, first + _NUM_SPECIALS))


def fits(text: EmuText, ids: SlotTokens) -> bool:
    """Whether a model with these special ids can be one of these texts."""
    return text.text_size <= (ids.pad if isinstance(text, ImportedText) else ids.begin)


def language_model(workdir: str) -> tuple[epath.Path, DecoderConfig]:
    """The stage's folder and the sizes of an imported LLaMA; UserError if the run holds another model."""
    folder = starting_point.find(workdir, SETTING)
    if not (folder / starting_point.IMPORTED).exists():
        raise UserError(
            f"{workdir} is no imported language model; give a run of `rag-mm import llama`."
        )
    path = folder / starting_point.IMPORTED
    values = renames.from_stored(frozen.read_config(path, ("llama",))[1])
    return folder, configuration.make(DecoderConfig, values, str(path / frozen.CONFIG))


def of_language_model(workdir: str) -> ImportedText:
    """The tokenizer of an imported LLaMA.

    Raises:
        UserError: it has none, has ids beyond the model's, or does not say what begins and ends a text.
    """
    folder, config = language_model(workdir)
    public = public_text.load_tokenizer(folder / starting_point.IMPORTED)
    if public is None:
        raise UserError(
            f"{workdir} was imported without a tokenizer; import it again from a folder with "
            f"{public_text.TOKENIZER}."
        )
    values = files.read_object(folder / _SOURCE / _CONFIG)
    begin, end = (_first(values.get(name)) for name in ("bos_token_id", "eos_token_id"))
    if begin is None or end is None or begin == end:
        raise UserError(
            f"{workdir} does not say which ids begin and end a sequence; write bos_token_id and "
            "eos_token_id, two ids, into the checkpoint's config.json and import it again."
        )
    if max(public.size - 1, begin, end) >= config.vocab_size:
        raise UserError(
            f"The tokenizer of {workdir} has ids beyond the model's vocabulary of {config.vocab_size:,}; "
            "import it with its own tokenizer."
        )
    return ImportedText(public, config.vocab_size, begin, end)


def _first(given: Any) -> int | None:
    """An id, or the first of several; None for anything else."""
    given = given[0] if isinstance(given, list) and given else given
    return given if type(given) is int and given >= 0 else None
