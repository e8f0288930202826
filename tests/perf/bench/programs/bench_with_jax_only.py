"""Runs the `rag-mm` commands COMMANDS (JSON) where none of the packages ABSENT can be imported."""

import json
import sys

ABSENT = (
    "torch", "transformers", "tensorflow", "tensorflow_datasets", "scann", "grain", "clu",
    "faiss", "ml_collections", "tokenizers", "safetensors", "matplotlib", "PIL",
)  # fmt: skip


def main(commands: list[list[str]]) -> None:
    sys.modules.update(dict.fromkeys(ABSENT))  # None: importing it fails.
    from rag_mm.cli import main as cli

    assert not any(cli.main(words) for words in commands)
    assert not any(sys.modules[name] for name in ABSENT)


main(json.loads(sys.argv[1]))
