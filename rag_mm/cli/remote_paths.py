"""Paths in a bucket: one check for all commands, before any of them begins to work."""

import argparse

from rag_mm.core import remote

# Arguments that name what a command writes, or a run, memory or corpus that it reads or changes. Documents
# are not among them, since each kind of source says what it reads; a language model may be behind HTTP.
LOCAL = frozenset(
    "against corpus html memory other out rejects retriever reuse run sheet tokenizer workdir".split()
)
# Those that may be remote all the same: all files of a run that is trained are read and written by `epath`.
ACCEPTED = {"train": frozenset({"workdir", "reuse"})}


def check(command: str, args: argparse.Namespace) -> None:
    """Checks all arguments of a command that name a file or folder.

    Raises:
        UserError: one is remote, but must be on a file system of this machine.
    """
    for name in sorted(LOCAL & vars(args).keys() - ACCEPTED.get(command, frozenset())):
        value = getattr(args, name)
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, str):
                remote.check_local(path)
