"""A finished run in Python: draw, describe, fill in, search; the commands give the same."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.api.open_lm import open_lm
from rag_mm.cli import main
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.decode import sampler
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance
from rag_mm.memory import policy

PROMPT = "red apple at the top left on a blue background"


@pytest.fixture(scope="module")
def run(tiny_run):
    return rag_mm.load(str(tiny_run.workdir))


@pytest.fixture(scope="module")
def picture(run):
    return run.memory.document(0).image


def by_hand(run, count: int) -> list[Document]:
    found = [run.memory.document(row) for row in range(count)]
    return [Document(f"mine-{i}", d.segments) for i, d in enumerate(found)]


def test_its_decoder_is_a_language_model_of_its_texts(run, tiny_run):
    model = open_lm(str(tiny_run.workdir))
    found = model.score(["red apple on a"], [" blue background", " qxz"])
    assert found.shape == (1, 2) and found[0, 0] > found[0, 1]
    assert len(model.generate(["red apple"], num_tokens=4).tokens[0]) <= 4
    assert len(model.vocabulary) == run.generator.params["embedding"]["table"].shape[0]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool((one == other).all())


@pytest.mark.parametrize("docs", [0, 1, 2])
def test_it_draws_after_reading_so_many_documents(run, docs):
    drawn = run.generate(PROMPT, docs=docs, num=2, seed=3)
    assert drawn.images.shape == (2, 32, 32, 3) and drawn.images.dtype == np.uint8
    assert len(drawn.neighbors) == docs
    assert all(set(d) == {"id", "score", "text", "url", "license"} for d in drawn.neighbors)
    assert [d["score"] for d in drawn.neighbors] == sorted(
        (d["score"] for d in drawn.neighbors), reverse=True
    )
    assert not same(drawn.images[0], drawn.images[1])


@pytest.mark.slow
def test_a_decoder_on_several_devices_draws_and_describes_the_same(run, tiny_run, picture, capsys):
    """Also a batch of 3 over two devices, and by the command; what does not fit is refused."""
    split = rag_mm.load(str(tiny_run.workdir), mesh=(2, 1, 2))
    assert len(split.generator.params["embedding"]["table"].devices()) == 4
    options = dict(docs=1, num=3, seed=3)
    assert same(split.generate(PROMPT, **options).images, run.generate(PROMPT, **options).images)
    assert split.caption(picture, docs=1).captions == run.caption(picture, docs=1).captions
    words = ["generate", f"--workdir={tiny_run.workdir}", f"--prompt={PROMPT}", "--out=x.png"]
    assert main.main([*words, "--mesh", "3", "3", "1"]) == 2
    assert "9 devices, but there are 8" in capsys.readouterr().err
    assert main.main([*words, "--mesh", "1", "1", "0"]) == 2
    assert main.main([*words, "--mesh", "1", "1", "8"]) == 2
    assert "does not split over the mesh" in capsys.readouterr().err


def test_the_decoder_of_another_stage_draws_where_it_is_named(run, tiny_run, tmp_path, capsys):
    other = rag_mm.load(str(tiny_run.workdir), stage="control")
    tables = [each.generator.params["embedding"]["table"] for each in (run, other)]
    assert not np.array_equal(*tables)
    words = ["generate", f"--workdir={tiny_run.workdir}", f"--prompt={PROMPT}", "--docs=0"]
    assert main.main([*words, "--stage=control", f"--out={tmp_path / 'x.png'}", "--json"]) == 0
    capsys.readouterr()
    drawn = np.asarray(PIL.Image.open(tmp_path / "x.png"))
    assert same(drawn, other.generate(PROMPT, docs=0).images[0])


def test_a_caption_of_two_is_asked_phrase_by_phrase_where_the_run_says_so(run):
    # Captions that only name: both together have to fit the model.
    rows = range(16), range(len(run.memory) - 16, len(run.memory))
    first, second = (min((run.memory.document(i).text for i in part), key=len) for part in rows)
    alone = [run.generate(text, docs=1).neighbors[0]["id"] for text in (first, second)]
    split_phrases = dataclasses.replace(run, rules=policy.Rules(split_phrases=True))
    both = split_phrases.generate(f"{first} and {second}", docs=2).neighbors
    assert {found["id"] for found in both} == set(alone)


def test_the_seed_decides(run):
    first = run.generate(PROMPT, seed=1).images
    assert same(first, run.generate(PROMPT, seed=1).images)
    assert not same(first, run.generate(PROMPT, seed=2).images)
    # Temperature 0 takes the likeliest code whatever the seed.
    greedy = [run.generate(PROMPT, seed=seed, temperature=0.0).images for seed in (1, 2)]
    assert same(*greedy)


def test_best_of_keeps_the_picture_nearest_to_the_prompt(run):
    wanted = run.encoder.encode_text([PROMPT])

    def score(best_of):
        drawn = run.generate(PROMPT, num=2, best_of=best_of, seed=5)
        return (run.encoder.encode_image(drawn.images) * wanted).sum(axis=1)

    assert (score(3) >= score(1)).all()


def test_guidance_of_1_draws_the_plain_images_and_of_0_those_without_a_caption(run):
    options = dict(docs=1, num=2, seed=6)
    plain = run.generate(PROMPT, **options).images
    assert same(run.generate(PROMPT, guidance=Guidance(1.0), **options).images, plain)
    unread = [
        run.generate(prompt, guidance=Guidance(0.0), **options).images
        for prompt in (PROMPT, "pear")
    ]
    assert same(*unread) and not same(unread[0], plain)
    greedy = run.generate(PROMPT, temperature=0.0, **options).images
    contrast = Contrast(k=1, alpha=1.0)
    assert same(run.generate(PROMPT, contrast=contrast, **options).images, greedy)
    jacobi = dict(decoding="jacobi", temperature=0.0) | options
    assert same(run.generate(PROMPT, **jacobi).images, greedy)


def test_half_of_the_candidates_are_made_by_guidance_and_half_by_contrast(run):
    ways = dict(guidance=Guidance(1.5, plausible=0.1), contrast=Contrast())
    options = dict(docs=1, num=2, seed=6, best_of=4)
    mixed = run.generate(PROMPT, **ways, **options)
    assert mixed.candidates.shape == (2, 4, 32, 32, 3) and mixed.scores.shape == (2, 4)
    for start, way in enumerate(ways):
        alone = run.generate(PROMPT, **{way: ways[way]}, **options)
        assert same(mixed.candidates[:, start::2], alone.candidates[:, start::2])
    best = mixed.scores.argmax(axis=1)
    assert same(mixed.images, mixed.candidates[[0, 1], best])
    with pytest.raises(UserError, match="best_of is 1; give 2 or more"):
        run.generate(PROMPT, **ways)


def test_images_and_prompts_in_every_form_are_the_same(run, picture):
    expected = run.caption(picture, docs=1)
    for image in (picture / 255, PIL.Image.fromarray(picture).convert("RGBA")):
        found = run.caption(image, docs=1)
        assert (found.captions, found.neighbors) == (expected.captions, expected.neighbors)
    drawn = run.generate(f"\ufeff {PROMPT}\r\n", docs=1, seed=1)
    assert same(drawn.images, run.generate(PROMPT, docs=1, seed=1).images)
    shouted = run.memory.search(text=PROMPT.upper(), k=3)
    np.testing.assert_array_equal(shouted.ids, run.memory.search(text=PROMPT, k=3).ids)


def test_a_path_and_a_negative_seed_are_one_sentence(run, picture):
    with pytest.raises(UserError, match="is a path; open it with"):
        run.caption("some.png")
    with pytest.raises(UserError, match="seed is -1; give an integer of at least 0"):
        run.generate(PROMPT, seed=-1)
    with pytest.raises(UserError, match="seed is -2"):
        run.infill(picture, PROMPT, (8, 24), seed=-2)


def test_documents_by_hand_are_read_instead(run):
    drawn = run.generate(PROMPT, documents=by_hand(run, 2), seed=1)
    assert [d["id"] for d in drawn.neighbors] == ["mine-0", "mine-1"]
    assert [d["score"] for d in drawn.neighbors] == [None, None]
    with pytest.raises(UserError, match="reads 0 to 2 documents, not 3"):
        run.generate(PROMPT, documents=by_hand(run, 3))
    with pytest.raises(UserError, match="'words' has no image"):
        run.generate(PROMPT, documents=[Document("words", (Text("an apple"),))])


def test_a_picture_of_any_size_is_put_into_words(run, picture):
    written = run.caption(np.kron(picture, np.ones((2, 3, 1), np.uint8)), num=2, temperature=1.0)
    assert len(written.captions) == 2 and all(isinstance(c, str) for c in written.captions)
    assert written.mean_log_probs == sorted(written.mean_log_probs, reverse=True)
    assert len(written.neighbors) == 2


def test_a_long_caption_of_likelier_tokens_comes_before_a_short_one(run, picture, monkeypatch):
    """Two tokens of -2 nats are likelier in total than eight of -1, but not by token."""
    vocabulary = run.image_tokenizer.vocabulary
    num_steps = run.generator.layout.max_text_len + 1
    tokens = np.full((2, num_steps), vocabulary.eoss, np.int32)
    log_probs = np.zeros((2, num_steps), np.float32)
    short, long = vocabulary.encode_text("a")[:1], vocabulary.encode_text("an apple on a pear")[:7]
    for row, (text, each) in enumerate(((short, -2.0), (long, -1.0))):
        tokens[row, : len(text)] = text
        log_probs[row, : len(text) + 1] = each
    assert log_probs[0].sum() > log_probs[1].sum()
    drawn = sampler.SampledTokens(tokens, log_probs)
    monkeypatch.setattr(sampler, "sample", lambda *args, **options: drawn)
    written = run.caption(picture, docs=0, num=2, temperature=1.0)
    assert written.captions == [vocabulary.decode_text(long), vocabulary.decode_text(short)]
    assert written.mean_log_probs == [-1.0, -2.0]


def test_infill_redraws_the_band_alone(run, picture):
    """The tokenizer's decoder looks a little beyond a code, so other rows move, but hardly."""
    drawn = run.infill(picture, PROMPT, (8, 16), docs=1, seed=2).images
    whole = run.image_tokenizer.decode(run.image_tokenizer.encode(picture[None]))
    moved = np.abs(drawn.astype(int) - whole)[0].mean(axis=(1, 2))
    assert drawn.shape == whole.shape
    assert moved[20:].max() < 0.2 * moved[8:16].mean()


def test_a_picture_finds_itself(run, picture):
    found = run.memory.search(image=picture, k=3)
    assert run.memory.document(int(found.ids[0, 0])).image.shape == picture.shape
    assert found.scores[0, 0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_temperature_is_a_finite_number(run, value):
    with pytest.raises(UserError, match="temperature"):
        run.generate(PROMPT, temperature=value)


def test_the_commands_give_the_same(run, tiny_run, picture, tmp_path, capsys):
    def call(*words: str) -> dict:
        assert main.main([*words, f"--workdir={tiny_run.workdir}", "--seed=4", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def pixels(path: str) -> np.ndarray:
        return np.asarray(PIL.Image.open(path))

    source, out = tmp_path / "in.png", f"--out={tmp_path / 'x.png'}"
    PIL.Image.fromarray(picture).save(source)
    drawn = run.generate(PROMPT, num=2, seed=4)
    result = call("generate", f"--prompt={PROMPT}", "--num=2", out)
    assert result["images"] == [str(tmp_path / f"x-{i}.png") for i in range(2)]
    assert all(same(pixels(p), d) for p, d in zip(result["images"], drawn.images, strict=True))
    assert result["neighbors"] == drawn.neighbors
    drawn = run.generate(PROMPT, seed=4, best_of=2, guidance=Guidance(2.0, "documents"))
    words = ("--guidance=2", "--null=documents", "--best-of=2", out)
    result = call("generate", f"--prompt={PROMPT}", *words)
    assert same(pixels(result["images"][0]), drawn.images[0])
    np.testing.assert_allclose(result["scores"], drawn.scores)
    filled = run.infill(picture, PROMPT, (0, 8), docs=0, seed=4)
    words = ("infill", f"--image={source}", f"--prompt={PROMPT}", "--rows=0:8", "--docs=0", out)
    assert call(*words) == {"images": [str(tmp_path / "x.png")], "neighbors": []}
    assert same(pixels(tmp_path / "x.png"), filled.images[0])
    written = run.caption(picture, seed=4)
    told = call("caption", f"--image={source}")
    assert told == {
        "captions": written.captions,
        "mean_log_probs": written.mean_log_probs,
        "neighbors": written.neighbors,
    }


def test_documents_by_hand_on_the_command_line(run, tiny_run, tmp_path, capsys):
    PIL.Image.fromarray(run.memory.document(0).image).save(tmp_path / "mine.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "mine.png", "caption": "an apple"}\n')
    words = ["generate", f"--workdir={tiny_run.workdir}", "--prompt=apple", "--json"]
    assert main.main([*words, f"--documents={tmp_path}", f"--out={tmp_path / 'x.png'}"]) == 0
    (read,) = json.loads(capsys.readouterr().out)["neighbors"]
    assert (read["id"], read["score"], read["text"]) == ("mine", None, "an apple")
    mine = Document("mine", (Text("an apple"), Image(run.memory.document(0).image)))
    drawn = run.generate("apple", documents=[mine])
    assert same(np.asarray(PIL.Image.open(tmp_path / "x.png")), drawn.images[0])
