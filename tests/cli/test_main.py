"""What every command shares: quick help, one-sentence user errors, and only JSON on stdout."""

import json
import os
import pathlib
import resource
import shlex
import subprocess
import sys
import textwrap
import time
import types

import fresh_python
import numpy as np
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core import files
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
        (OSError(122, "Disk quota exceeded"), 2, "rag-mm: Disk quota exceeded.\n"),
        (OSError(27, "File too large", "a.npy"), 2, "rag-mm: a.npy: File too large.\n"),
        (
            RuntimeError("write() failed: No space left on device; writing a.arrayrecord"),
            2,
            "rag-mm: No space left on device.\n",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing: Disk quota exceeded [os_error_code=]"),
            2,
            "rag-mm: Disk quota exceeded.\n",
        ),
        (KeyboardInterrupt(), 130, "rag-mm: interrupted.\n"),
    ],
)
def test_user_errors_have_no_traceback(command, capsys, error, code, says):
    command.run = _raising(error)
    for words in (["doctor"], ["doctor", "--json"]):
        assert main.main(words) == code
        assert capsys.readouterr() == ("", says)


def test_a_full_disk_is_found_behind_other_errors(command, capsys):
    def run(args):
        try:
            raise OSError(28, "No space left on device", "rows.npy")
        except OSError as error:
            raise RuntimeError("the writer stopped") from error

    command.run = run
    assert main.main(["doctor"]) == 2
    assert capsys.readouterr().err == "rag-mm: rows.npy: No space left on device.\n"


def _write_records(folder):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    writer.write(np.random.default_rng(0).bytes(1 << 20))
    writer.close()


def _write_parameters(folder):
    from rag_mm.train import checkpoint

    values = np.random.default_rng(0).normal(size=(1 << 18)).astype(np.float32)
    checkpoint.save_params(folder / "params", {"a": values})


def _write_json(folder):
    files.write_json(folder / "a.json", {"a": "b" * (1 << 20)})


def _write_array(folder):
    np.save(folder / "a.npy", np.zeros(1 << 20, np.uint8))


@pytest.mark.parametrize("write", [_write_records, _write_parameters, _write_json, _write_array])
def test_a_limit_of_file_sizes_is_one_sentence_whatever_writes(command, tmp_path, write, capsys):
    """As `ulimit -f` and quotas set it; libraries in C++ raise other types of errors."""
    command.run = lambda args: write(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        code = main.main(["doctor"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1, err
    assert "File too large" in err or "a limit of file sizes is reached" in err


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


def _python(code, closed=(), **options):
    """Runs a command whose work is `code`, in a process of its own, with the streams `closed`."""
    program = f"""
import sys, types
module = types.ModuleType("rag_mm.cli.doctor")
module.add_arguments = lambda parser: None
module.show = lambda result, console: console.print(result["text"])
def run(args):
{textwrap.indent(code, "    ")}
module.run = run
sys.modules["rag_mm.cli.doctor"] = module
sys.argv = ["rag-mm", "doctor"]
from rag_mm.cli import main
sys.exit(main.main())
"""
    environment = {**os.environ, **options.pop("environment", {})}
    shell = f'exec "$@" {" ".join(f"{number}>&-" for number in closed)}'
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", program]
    return subprocess.run(words, check=False, timeout=60, env=environment, **options)


def test_ctrl_c_ends_the_process_before_threads_of_libraries_do():
    """A thread that would end the process by a signal once Python is being finalized."""
    code = """
import atexit, os, signal
atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
raise KeyboardInterrupt
"""
    done = _python(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "rag-mm: interrupted.\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_terminal_that_lacks_characters_gets_their_numbers(encoding):
    environment = {"PYTHONIOENCODING": encoding}
    done = _python('return {"text": "苹果 é"}', capture_output=True, environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == {
        "latin-1": "\\u82f9\\u679c é\n",
        "ascii": "\\u82f9\\u679c \\xe9\n",
        "utf-8": "苹果 é\n",
    }[encoding]  # fmt: skip


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_closed_streams_get_nothing_and_no_file_is_taken_for_them(tmp_path, closed):
    """What is printed goes into no file that happens to be opened under the stream's number."""
    code = f"""
import os
with open({str(tmp_path / "data")!r}, "w") as file:
    os.write(1, b"chatter from C"), os.write(2, b"chatter from C")
    file.write("data")
return dict(text="some text")
"""
    done = _python(code, closed, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "data").read_text() == "data"
    assert (b"some text" in done.stdout) == (1 not in closed)


@pytest.mark.parametrize("lines", ['"x\\n" * 20_000', '"x"'])
def test_a_reader_that_has_enough_is_no_error(lines):
    """As `| head` and `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = _python(f"return dict(text={lines})", stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_device_as_stdout_is_one_sentence():
    with open("/dev/full", "wb") as stdout:
        done = _python("return dict(text='x')", stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"rag-mm: No space left on device.\n")


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_that_jax_does_not_find_is_one_sentence(platforms):
    code = "import jax; jax.devices()"
    done = _python(code, capture_output=True, text=True, environment={"JAX_PLATFORMS": platforms})
    says = f"rag-mm: jax finds no device for JAX_PLATFORMS={platforms}; unset it"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(says) and "Traceback" not in done.stderr


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
