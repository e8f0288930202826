"""Progress goes to stderr, with few lines if it is not a terminal."""

import sys

from rag_mm.core import progress


def test_silent_when_quick(capsys):
    with progress.track("decoder", total=3) as bar:
        for step in range(1, 4):
            bar.update(step, loss=0.5)
    assert capsys.readouterr() == ("", "")


def test_a_line_every_half_minute_with_the_time_left(capsys, monkeypatch):
    """Only this part sets the pace: a loop resumed at 100 has done 50 steps in 40 s, and 50 remain."""
    clock = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.track("decoder", total=200, start=100) as bar:
        bar.update(110, loss=2.0)
        bar.update(150, loss=1.23456)
        bar.update(151, loss=1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "decoder 150/200, 0:40 left loss=1.235\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.track("tokenizer", total=2) as bar:
        bar.update(2, loss=0.25)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizer" in err and "2/2" in err and "loss=0.25" in err


def test_say_prints_on_stderr(capsys):
    progress.say("tokenizer is done")
    assert capsys.readouterr() == ("", "tokenizer is done\n")
