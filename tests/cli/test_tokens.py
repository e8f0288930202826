"""`rag-mm tokens`: words and back, files written, and one sentence for each bad input."""

import json
import types

import numpy as np
import PIL.Image
import pytest
import stand_in_words

from rag_mm.api import open_lm
from rag_mm.cli import main
from rag_mm.frozen_lm import endpoint
from rag_mm.stages.spae import word_images


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(word_images, "load", lambda workdir: stand_in_words.WordedImages())
    gradient = np.tile(np.linspace(0, 255, 20, dtype=np.uint8), (30, 1))
    PIL.Image.fromarray(gradient).save("gray.png")
    (tmp_path / "docs").mkdir()
    lines = []
    for i in range(3):
        PIL.Image.fromarray(np.full((9, 9), 80 * i, np.uint8)).save(f"docs/{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"level {i}"}))
    (tmp_path / "docs" / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def answer(capsys, *words):
    assert main.main(["tokens", *words, "--workdir=run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_shown_words_decode_to_the_image(desk, capsys):
    found = answer(capsys, "show", "gray.png", "--out=words.png")
    levels = found["levels"]
    assert [len(level["words"]) for level in levels] == [1, 2, 4]
    assert levels[2]["words"][0] == levels[2]["words"][3]
    assert np.array(levels[1]["scores"]).shape == (2, 2)
    assert levels[2]["psnr"] > levels[0]["psnr"]
    assert PIL.Image.open("words.png").width > 1000
    text = " ".join(word for level in levels for row in level["words"] for word in row)
    answer(capsys, "decode", text, "--out=back.png")
    back = np.asarray(PIL.Image.open("back.png"))
    assert back.shape == (8, 8, 3) and (np.diff(back[0, ::2, 0].astype(int)) > 0).all()


def test_the_majority_vote_needs_no_language_model(desk, capsys):
    found = answer(capsys, "complete", "gray.png", "--task=rotate", "--out=c.png", "--examples=2")
    assert set(found["figures"]) == {"majority", "given", "valid"}
    assert main.main("tokens complete gray.png --task=shift --out=c.png --workdir=run".split()) == 0
    assert "right codes, majority" in capsys.readouterr().out
    words = ["--task=text-to-image", "--prompt=level 7", "--documents=docs", "--examples=3"]
    answer(capsys, "complete", *words, "--out=d.png")
    assert PIL.Image.open("d.png").height > 96


def test_a_language_model_writes_within_the_given_limits(desk, capsys, monkeypatch):
    """Prompts show as many words as asked for; the share of words that are its tokens is told."""
    reader, opened = stand_in_words.MajorityReader(), []
    reader.vocabulary = [" " + word for word in stand_in_words.WORDS[:12]]
    lm = "--lm=http://localhost:9/v1#tiny"
    monkeypatch.setattr(
        open_lm, "open_lm", lambda address, limits: opened.append((address, limits)) or reader
    )
    words = ["complete", "gray.png", "--task=shift", "--out=c.png", "--before=2", "--segment=1", lm]
    found = answer(capsys, *words, "--timeout=5", "--max-cost=0.5", "--tokens-per-word=2")
    assert found["one_token_words"] == 0.75 and found["figures"]["valid"] == 1.0
    before = [
        len(line.split()) - 1 for p in reader.prompts for line in p.split("\n") if line[:2] == "Q:"
    ]
    assert max(before) == 2
    assert opened == [(lm[5:], endpoint.EndpointLimits(timeout=5, max_cost=0.5))]
    reader.generate = lambda prompts, num_tokens: types.SimpleNamespace(texts=[" a level"])
    asked = ["ask", "gray.png", "--documents=docs", "--examples=2", lm]
    assert answer(capsys, *asked) == {"text": "a level", "one_token_words": 0.75}
    assert main.main(["tokens", *asked, "--workdir=run"]) == 0
    assert "75.0% of the run's words are one token of the LM\n" in capsys.readouterr().out
    assert opened[-1] == (lm[5:], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("complete gray.png --task=shift --before=-1 --out=x.png", "--before is -1"),
        (
            "complete gray.png --task=shift --tokens-per-word=0 --out=x.png",
            "--tokens-per-word is 0",
        ),
        (
            "complete gray.png --task=shift --retries=1 --out=x.png",
            "--retries is about an endpoint",
        ),
        ("ask gray.png --documents=docs --lm=runs/lm --price=1", "--price is about an endpoint"),
        ("show nothing.png --out=x.png", "nothing.png cannot be read"),
        ("show gray.png --out=x.jpg", "is not a PNG file"),
        ("decode snow,snow --out=x.png", "'snow,snow' is not one of the 16 words"),
        ("decode snou --out=x.png", "did you mean 'snow'?"),
        ("complete --task=shift --out=x.png", "--task=shift needs IMAGE"),
        ("complete gray.png --task=text-to-image --out=x.png", "takes no IMAGE"),
        ("complete gray.png --task=shift --prompt=a --out=x.png", "takes no --prompt"),
        ("complete gray.png --task=shift --examples=0 --out=x.png", "0 examples are out of range"),
        ("complete gray.png --task=shift --segment=0 --out=x.png", "--segment is 0"),
        ("complete gray.png --task=shift --seed=-1 --out=x.png", "--seed=-1 is negative"),
        (
            "complete --task=text-to-image --prompt=a --documents=docs --out=x.png",
            "Only 3 documents have a text and a picture; give 10",
        ),
        ("ask gray.png --documents=docs --lm=nothing", "nothing is not a run"),
        ("ask gray.png --documents=docs --lm=http://localhost/v1", "names no model"),
        ("ask gray.png --documents=no --lm=nothing", "no is not a folder"),
    ],
)
def test_a_user_error_is_one_sentence(desk, capsys, words, message):
    assert main.main(["tokens", *words.split(), "--workdir=run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (desk / "x.png").exists()


def test_the_number_of_words_must_be_that_of_some_levels(desk, capsys):
    assert main.main(["tokens", "decode", "snow milk", "--workdir=run", "--out=x.png"]) == 2
    assert "These are 2 words; an image has one of 1, 5, 21" in capsys.readouterr().err
