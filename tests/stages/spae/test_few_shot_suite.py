"""Suite `fewshot` on class folders: any image, the run's words, and a language model beside the overlap."""

import json
import re

import local_endpoint
import numpy as np
import PIL.Image
import pytest
import stand_in_words

from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.data import labeled
from rag_mm.eval.few_shot_episodes import AskConfig, EpisodeConfig
from rag_mm.stages.spae import few_shot_suite, word_images
from rag_mm.stages.spae.few_shot_suite import WordsConfig

EPISODES = EpisodeConfig(ways=3, num_episodes=10)


@pytest.fixture
def opened(monkeypatch):
    worded = stand_in_words.WordedImages()
    monkeypatch.setattr(word_images, "load", lambda workdir: worded)
    return worded


@pytest.fixture
def folder(tmp_path):
    """Three classes of brightness: color and gray, wide and high, and one file that is no image."""
    for name, level in (("dark", 40), ("middle_gray", 130), ("bright", 220)):
        (tmp_path / name).mkdir()
        for i, (mode, size) in enumerate([("RGB", (8, 8)), ("L", (31, 17)), ("LA", (9, 40))]):
            image = PIL.Image.new("L", size, level).convert(mode)
            image.save(tmp_path / name / f"{i}.png")
    (tmp_path / "dark" / "bad.png").write_text("no image")
    return tmp_path


def test_gray_images_of_odd_sizes_are_told_apart_by_their_words(opened, folder):
    found = few_shot_suite.evaluate("run", labeled.LabeledFolder(folder), episodes=EPISODES)
    assert found["accuracy"] == found["overlap"]["accuracy"] == 1.0
    assert found["method"] == "overlap" and found["n"] == 10 and found["chance"] == 1 / 3
    assert found["words"] == 5 and found["classes"] == 3
    assert found["per_episode"] == {"overlap": [1.0] * 10}
    assert [name.endswith("bad.png") for name, _ in found["rejected"]] == [True]


def test_a_language_model_is_reported_beside_the_overlap(opened, folder):
    ask, reader = AskConfig(labels="nouns", scoring="both"), stand_in_words.BiasedReader()
    images = labeled.LabeledFolder(folder)
    found = few_shot_suite.evaluate("run", images, lm=reader, episodes=EPISODES, ask=ask)
    assert found["method"] == "calibrated" and found["accuracy"] == 1.0
    assert found["log_p"]["accuracy"] == pytest.approx(1 / 3)
    assert found["over_overlap"]["mean"] == 0.0
    assert set(found["per_episode"]) == {"overlap", "log_p", "calibrated", "greedy"}
    assert found["one_token_words"] == 1.0


def overlap_answer(handler, asked):
    """Writes the label of the example with most words of the question; scores as the server does."""
    status, answer = handler.complete(asked)
    for choice in answer["choices"] if not asked.get("echo") else ():
        *shown, (words, _) = re.findall(
            r"Input: (.*)\nOutput:(.*)", asked["prompt"][choice["index"]]
        )
        own = set(words.split())
        choice["text"] = max(shown, key=lambda pair: len(own & set(pair[0].split())))[1] + "\nInput"
    return status, answer


def test_an_endpoint_is_asked_within_its_limits(opened, folder, capsys):
    """What it writes is read (greedy), beside the log-probabilities that it returns of the labels."""
    with local_endpoint.serving() as server:
        server.behave = overlap_answer
        command = ["eval", "--suite=fewshot", f"--images={folder}", "--workdir=run", "--ways=3"]
        command += ["--shots=2", "--episodes=3", f"--lm={server.address}#tiny", "--scoring=both"]
        assert main.main([*command, "--texts-per-call=64", "--max-calls=6", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(server.asked) == 6  # Each episode scores and writes.
        assert found["greedy"]["accuracy"] == 1.0 and found["greedy"]["n"] == 3
        assert 0 <= found["calibrated"]["accuracy"] <= 1 and found["one_token_words"] is None
        assert main.main([*command, "--texts-per-call=64", "--max-calls=5"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "was called 5 times, the limit" in err and "Traceback" not in err


def test_two_runs_are_compared_in_the_same_episodes(folder, monkeypatch):
    """The other run has one word for all images."""
    blind = stand_in_words.WordedImages()
    blind.words = tuple(f"word{i}" for i in range(16))
    blind.tokenizer = stand_in_words.BrightnessTokenizer()
    blind.tokenizer.encode = lambda pixels: np.zeros((len(pixels), 21), np.int32)
    opened = {"run": stand_in_words.WordedImages(), "blind": blind}
    monkeypatch.setattr(word_images, "load", opened.__getitem__)
    images = labeled.LabeledFolder(folder)
    found = few_shot_suite.evaluate("run", images, against="blind", episodes=EPISODES)
    difference = found["over_against"]["overlap"]
    assert difference["mean"] == pytest.approx(1 - 1 / 3) and difference["n"] == 10


@pytest.mark.parametrize(
    ("words", "first"),
    [(WordsConfig(levels=1), ["ash"]), (WordsConfig(top=2), ["ash", "coal"])],
)
def test_which_words_stand_for_an_image(opened, folder, words, first):
    """The dark images are of level 40 / 16; the best word is the nearest, then the next nearest."""
    bags, class_ids = few_shot_suite.read_bags(opened, labeled.LabeledFolder(folder), words)
    dark = [bag for bag, c in zip(bags, class_ids, strict=True) if c == 1]
    assert dark == [tuple(first)] * 3


def test_words_that_do_not_exist_are_refused(opened, folder):
    images = labeled.LabeledFolder(folder)
    with pytest.raises(UserError, match="has 3 levels, not 4"):
        few_shot_suite.read_bags(opened, images, WordsConfig(levels=4))
    with pytest.raises(UserError, match="only 16 words, not 17"):
        few_shot_suite.read_bags(opened, images, WordsConfig(top=17))
    blind = stand_in_words.WordedImages(has_retriever=False)
    with pytest.raises(UserError, match="no retriever to rank words by"):
        few_shot_suite.read_bags(blind, images, WordsConfig(top=1))
    with pytest.raises(UserError, match="either levels or top"):
        WordsConfig(levels=1, top=1)


def test_the_command_prints_the_same(opened, folder, capsys):
    command = ["eval", "--suite=fewshot", f"--images={folder}", "--workdir=run", "--ways=3"]
    assert main.main([*command, "--episodes=10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    same = few_shot_suite.evaluate("run", labeled.LabeledFolder(folder), episodes=EPISODES)
    assert found == {"suite": "fewshot", **same}
    assert main.main([*command, "--episodes=10", "--top=1"]) == 0
    said = capsys.readouterr().out
    assert "word overlap, no LM  100.0%" in said and "1 words per image" in said
    assert "bad.png" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "3 of 3 classes have 2 images or more, but 5-way 1-shot"),
        ("--ways=3 --shots=3", "0 of 3 classes have 4 images"),
        ("--ways=1", "ways is 1"),
        ("--episodes=1", "num_episodes is 1"),
        ("--ways=2 --levels=9", "has 3 levels, not 9"),
        ("--ways=2 --top=0", "top is 0"),
        ("--ways=2 --repeats=1", "--repeats is about asking a language model"),
        ("--ways=2 --bags=2", "--bags is about asking a language model"),
        (
            "--ways=2 --max-cost=2",
            "--max-cost is about an endpoint; give --lm=http://HOST/v1#MODEL",
        ),
        ("--ways=2 --lm=runs/lm --timeout=9", "--timeout is about an endpoint"),
        ("--ways=2 --lm=http://h/v1#m --max-calls=0", "--max-calls is 0; give at least 1"),
        ("--ways=2 --lm=http://h/v1#m --timeout=inf", "--timeout is inf; give 0 to 86400"),
        ("--ways=2 --refine=image", "--refine is an option of --suite=zeroshot, not of fewshot"),
        ("--ways=2 -k 2", "-k is an option of --suite=zeroshot"),
    ],
)
def test_a_user_error_is_one_sentence(opened, folder, capsys, words, message):
    command = ["eval", "--suite=fewshot", f"--images={folder}", "--workdir=run", *words.split()]
    assert main.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_zeroshot_takes_no_option_of_fewshot(folder, capsys):
    command = ["eval", "--suite=zeroshot", f"--images={folder}", "--workdir=run", "--ways=3"]
    assert main.main(command) == 2
    assert "--ways is an option of --suite=fewshot" in capsys.readouterr().err


def test_equal_classes_are_at_chance(opened, tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        for i in range(2):
            PIL.Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / name / f"{i}.png")
    found = few_shot_suite.evaluate("run", labeled.LabeledFolder(tmp_path), episodes=EPISODES)
    assert found["accuracy"] == pytest.approx(1 / 3)
