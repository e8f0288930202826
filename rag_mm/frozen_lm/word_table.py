"""The words of a language model: the text of each of its tokens, and its vector."""

import numpy as np
from etils import epath

from rag_mm.convert import gguf_format, shards
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text

_STAGE, _FROZEN, _PARAMS = "language_model", "frozen", "params.safetensors"  # of an imported run
_OURS = ("embedding/table", "decoder/embedding/table")
# A tied table may be stored as the head alone.
_THEIRS = ("model.embed_tokens.weight", "lm_head.weight")


def read_words(path: epath.PathLike) -> tuple[list[str], np.ndarray]:
    """The texts and vectors of a language model's tokens, in the order of their ids.

    Args:
        path: a GGUF file, a run of `rag-mm import`, or a checkpoint folder with safetensors.

    Returns:
        The text of each token inside a text, where a word begins with its space (" cat"), special tokens by
        name and an id without a token as ""; and the embedding table, float32 [V, D].

    Raises:
        UserError: there is no such model, it is damaged, or it has no tokenizer or table.
    """
    path = epath.Path(path)
    if path.is_file():
        checkpoint = gguf_format.open_file(path)
        text = checkpoint.texts.get(public_text.TOKENIZER)
        tokenizer = None if text is None else public_text.from_json(text)
        specs, names = checkpoint.specs, _THEIRS
    elif _is_imported_run(path):
        folder = run_folder.open_run(path).finished_stage(_STAGE) / _FROZEN
        tokenizer = public_text.load_tokenizer(folder)
        specs, names = shards.read_header(folder / _PARAMS), _OURS
    else:
        tokenizer = public_text.load_tokenizer(path)
        specs, names = shards.open_folder(path), _THEIRS
    found = [specs[name] for name in names if name in specs]
    if tokenizer is None or not found:
        missing = "tokenizer" if tokenizer is None else "embedding table"
        raise UserError(f"{path} has no {missing}; give a language model that has both.")
    table = shards.read_tensor(found[0]).astype(np.float32)
    return list(tokenizer.token_texts(len(table))), table


def _is_imported_run(path: epath.Path) -> bool:
    config = path / "config.json"
    return config.exists() and "imported" in files.read_object(config)
