"""Words of strangers reach a terminal without control characters, whatever prints them."""

import contextlib
import io

import pytest
import rich.console

from rag_mm.cli import main, memory_show
from rag_mm.core import progress, terminal
from rag_mm.core.errors import UserError

# The title, the clipboard, upwards, a C1 introducer, the reverse order, half a character, back, delete.
EVIL = "\x1b]0;title\x07 \x1b]52;c;aGk=\x07 \x1b[2A \x9b31m \u202e \udcff \r \x7f"


def is_clean(text):
    return not any(c in text for c in "\x1b\x07\x9b\u202e\udcff\r\x7f")


def test_control_characters_are_escaped_and_nothing_else():
    assert terminal.printable("\x1b[31m\x00\x85") == "\\x1b[31m\\x00\\x85"
    plain = "Grün\n\tçà 猫 שלום 👩‍👩‍👧 [bold] \\x1b"
    assert terminal.printable(plain) == plain


def test_every_text_inside_a_value_is_escaped():
    value = {EVIL: [(EVIL, 1, None, 2.5, True), {"a": EVIL}]}
    escaped = terminal.printable(value)
    assert is_clean(str(list(escaped)) + escaped[next(iter(escaped))][1]["a"])
    assert escaped[terminal.printable(EVIL)][0][1:] == (1, None, 2.5, True)


RESULTS = [
    {
        "hits": [{"id": EVIL, "score": 1.0, "text": EVIL, "url": EVIL, "license": EVIL}],
        "html": EVIL,
    },
    {"problems": [EVIL], "ok": False, "memory": EVIL},
    {
        "memory": EVIL,
        "rejected": [{"name": EVIL, "reason": EVIL, "detail": EVIL}],
        "excluded": {EVIL: 1},
    },
]


@pytest.mark.parametrize("result", RESULTS)
def test_a_command_prints_no_control_characters(monkeypatch, result):
    class Command:
        add_arguments = staticmethod(lambda parser: None)
        run = staticmethod(lambda args: result)
        show = staticmethod(memory_show.show)

    monkeypatch.setattr(main, "load_command", lambda name: Command)
    monkeypatch.setattr(rich.console.Console, "is_terminal", False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main.main(["memory"])
    assert "title" in out.getvalue() and is_clean(out.getvalue())


def test_errors_and_notes_print_none_either(capsys):
    main.explain(UserError(EVIL))
    progress.say(EVIL)
    progress.warn(EVIL)
    assert is_clean(capsys.readouterr().err)
