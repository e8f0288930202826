"""`rag-mm train` works in a bucket; every other command refuses remote paths before it begins."""

import argparse

import pytest

from rag_mm.cli import main, remote_paths
from rag_mm.core import remote
from rag_mm.core.errors import UserError

REMOTE = "gs://bucket/folder"
PATHS = ("CORPUS", "DIR", "FILE", "MEM", "OTHER", "OUT", "PNG", "RUN")
# A metavar of what is only read, or is no path.
READ = {"FILE": {"boxes", "image", "inception"}, "DIR": {"documents", "exclude", "images"}}


def _path_arguments():
    """(command, words that choose the action, dest, option or "") of each argument that names a path."""

    def walk(command, words, parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, chosen in action.choices.items():
                    yield from walk(command, [*words, name], chosen)
            elif action.metavar in PATHS and action.dest not in READ.get(action.metavar, ()):
                yield command, words, action, parser

    for name in main.COMMANDS:
        parser = main.Parser(prog=f"rag-mm {name}")
        main.load_command(name).add_arguments(parser)
        yield from walk(name, [], parser)


def _argv(words, chosen, parser):
    """Words that give every required argument of an action some value, and the chosen one a remote one."""
    argv = list(words)
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    needed = [action for action in parser._actions if action.required]
    needed += [group[0] for group in groups if chosen not in group]
    for action in dict.fromkeys([*needed, chosen]):
        value = REMOTE if action is chosen else str((action.choices or ["x"])[0])
        argv += [*action.option_strings[:1], value]
    return argv


CASES = [
    pytest.param(name, _argv(words, action, parser), id=" ".join([name, *words, action.dest]))
    for name, words, action, parser in _path_arguments()
    if action.dest not in remote_paths.ACCEPTED.get(name, ())
]


@pytest.mark.parametrize(("command", "argv"), CASES)
def test_a_remote_path_is_refused_before_work_begins(command, argv, monkeypatch, capsys):
    module = main.load_command(command)
    monkeypatch.setattr(module, "run", lambda args: pytest.fail("work has begun"))
    assert main.main([command, *argv]) == 2
    said = capsys.readouterr().err
    assert f"{REMOTE} is remote" in said and said.count("\n") == 1


def test_all_commands_that_write_are_among_the_cases():
    refused = {case.values[0] for case in CASES}
    assert refused == set(main.COMMANDS) - {"train", "bench", "plan", "doctor"}


def test_addresses_that_are_no_paths_are_not_refused():
    args = argparse.Namespace(prompt="see https://a.b", lm="http://localhost/v1#m", url=["s3://a"])
    remote_paths.check("generate", args)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("s3://bucket/run", "only those of Google Cloud Storage"),
        ("memory://run", "only those of Google Cloud Storage"),
        ("gs://", "gs://BUCKET/FOLDER"),
        ("gs://bucket/run", r"pip install 'rag-mm\[gcs\]'"),
    ],
)
def test_a_run_is_in_a_bucket_or_on_a_disk(path, says, monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(remote.importlib, "import_module", absent)
    with pytest.raises(UserError, match=says):
        remote.check_run(path)
