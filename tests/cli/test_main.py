"""What every command shares: quick help, one-sentence user errors, and only JSON on stdout."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
import types

import fresh_python
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core.errors import UserError

ROOT = pathlib.Path(rag_mm.__file__).parent.parent


def _shell(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "rag_mm", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.fixture
def command(monkeypatch):
    """A stub for the module of `doctor`, whose `run` a test replaces."""
    module = types.ModuleType("rag_mm.cli.doctor")

    def add_arguments(parser):
        parser.add_argument("--config")
        parser.add_argument("--num", type=int, default=1)
        actions = parser.add_subparsers(dest="action")
        actions.add_parser("search").add_argument("query")

    module.add_arguments = add_arguments
    module.run = lambda args: {"num": args.num, "overrides": args.overrides}
    module.show = lambda result, console: console.print(f"num is {result['num']}")
    monkeypatch.setitem(sys.modules, "rag_mm.cli.doctor", module)
    return module


def test_help_answers_within_a_second():
    """Best of three, because other work may share the cores."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = _shell("--help")
        seconds.append(time.monotonic() - began)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in main.COMMANDS)
    assert min(seconds) < 1


def test_main_imports_no_command():
    loaded = fresh_python.modules_loaded_by("rag_mm.cli.main")
    assert not loaded & {"jax", "rich", "numpy"}


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([name, "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert all(example in out for example in main.COMMANDS[name].examples)
    assert "--json" in out


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_example_parses(name):
    module = main.load_command(name)
    for example in main.COMMANDS[name].examples:
        main._parse(name, module, shlex.split(example)[2:])


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{rag_mm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generat"], "There is no command 'generat'; did you mean 'generate'?"),
        (["zzz"], "There is no command 'zzz'; the commands are quickstart, train"),
        (
            ["doctor", "--num=x"],
            "Argument --num: invalid int value: 'x' (see rag-mm doctor --help).",
        ),
        (["doctor", "--bogus"], "Unknown argument '--bogus'"),
        (["doctor", "--nu=3"], "Unknown argument '--nu=3'"),
        (["doctor", "--config.seed"], "--config.seed has no value"),
        (
            ["doctor", "search"],
            "The following arguments are required: query (see rag-mm doctor search",
        ),
        (["doctor", "--config"], "Argument --config: expected one argument"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(command, capsys, words, says):
    assert main.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"rag-mm: {says}") and err.count("\n") == 1


def test_no_command_shows_help_and_fails(capsys):
    assert main.main([]) == 2
    assert "commands" in capsys.readouterr().out


def test_overrides_are_passed_on(command, capsys):
    words = ["doctor", "--config=a.py", "--config.seed=3", "--config.b.c=x=y", "--json"]
    assert main.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overrides"] == {"seed": "3", "b.c": "x=y"}


def test_text_output_without_json(command, capsys):
    assert main.main(["doctor", "--num=3"]) == 0
    assert capsys.readouterr().out == "num is 3\n"


def test_json_is_all_of_stdout(command, capfd):
    """Even where a library below prints, from Python or straight to the file descriptor."""

    def run(args):
        print("chatter")
        os.write(1, b"chatter from C\n")
        return {"query": args.query}

    command.run = run
    assert main.main(["doctor", "search", "--json", "apple"]) == 0
    out, err = capfd.readouterr()
    assert out == '{"query": "apple"}\n'
    assert "chatter\n" in err and "chatter from C\n" in err


def _raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("The run x is missing."), 2, "rag-mm: The run x is missing.\n"),
        (
            PermissionError(13, "Permission denied", "out.png"),
            2,
            "rag-mm: out.png: Permission denied.\n",
        ),
        (OSError(28, "No space left on device"), 2, "rag-mm: No space left on device.\n"),
        (KeyboardInterrupt(), 130, "rag-mm: interrupted.\n"),
    ],
)
def test_user_errors_have_no_traceback(command, capsys, error, code, says):
    command.run = _raising(error)
    for words in (["doctor"], ["doctor", "--json"]):
        assert main.main(words) == code
        assert capsys.readouterr() == ("", says)


def test_a_bug_keeps_its_traceback(command):
    command.run = _raising(OSError("unexpected"))
    with pytest.raises(OSError, match="unexpected"):
        main.main(["doctor"])


def test_a_failed_check_exits_1(command, capsys):
    command.run = lambda args: {"num": 0, "ok": False}
    assert main.main(["doctor"]) == 1


def test_a_real_shell_sees_the_exit_code():
    done = _shell("generat")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_cpu_is_chosen_only_without_an_accelerator(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(main.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    main.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr(main.glob, "glob", lambda pattern: [])
    main.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    main.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "tpu"
