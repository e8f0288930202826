"""Edit, ask, boxes and structures on a finished run: prompts as in tuning, mistakes, commands.

Its decoder is not tuned, but its stage says so: what it draws means nothing, and is quickly made.
"""

import json

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.decode import instruction_answers, tasks
from rag_mm.decode.guidance import Guidance
from rag_mm.stages.cm3leon import instruction_sequences, measure_tasks, scene_instructions
from rag_mm.worlds.emoji import emoji_scenes

EDIT = "change the background to red"


@pytest.fixture(scope="module")
def run(called_tuned):
    return rag_mm.load(str(called_tuned), stage="sft")


@pytest.fixture(scope="module")
def item():
    """An instruction about a scene, by the name of its task; texts short enough that none is cut."""
    scenes = emoji_scenes.open_documents("easy/common/test")

    def make(name):
        items = scene_instructions.SceneInstructions(scene_instructions.find(name), scenes)
        short = (items[i].item for i in range(len(items)))
        return next(i for i in short if len(i.fields.get("name", "")) < 8)

    return make


@pytest.fixture(scope="module")
def picture(item):
    return item("recolor").given[0]


def same(one, other):
    return one.shape == other.shape and bool((one == other).all())


def expected(run, item):
    """What the measurement of its task reads of an item, without documents."""
    tokenizer = run.image_tokenizer
    (coded,) = instruction_sequences.encode([item], tokenizer.encode, tokenizer.image_size)
    return measure_tasks.word(run.generator, coded, [])


def check_equal(example, other):
    assert list(example.text) == list(other.text)
    np.testing.assert_array_equal(example.codes, other.codes)


def box_of(text):
    left, top, _, right, bottom = text.split()
    return tuple(map(int, (left, top, right, bottom)))


def draw_boxes(run, item):
    fields = item.fields
    boxes = [(fields["name"], box_of(fields["box"]))]
    return run.generate(f"on a {fields['color']} background", boxes=boxes, docs=0)


def draw_structure(run, item):
    prompt = f"{item.fields['name']} on a {item.fields['color']} background"
    feature = item.task.removeprefix("from_")
    return run.generate(prompt, structure=item.given[0], feature=feature, docs=0)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("recolor", lambda run, i: run.edit(i.given[0], f"change the background to {i.fields['color']}")),
        ("swap", lambda run, i: run.edit(i.given[0], f"replace the {i.fields['name']}", second=i.given[1])),
        ("draw_boxes", draw_boxes),
        ("from_silhouette", draw_structure),
        ("from_edges", draw_structure),
    ],
)  # fmt: skip
def test_a_picture_is_asked_for_as_in_tuning(run, item, monkeypatch, name, draw):
    asked, generate_codes = [], tasks.generate_codes

    def listen(generator, texts, docs, *args, **options):
        asked.append((list(texts[0]), docs[0]))
        return generate_codes(generator, texts, docs, *args, **options)

    monkeypatch.setattr(tasks, "generate_codes", listen)
    made = item(name)
    assert draw(run, made).images.shape == (1, 32, 32, 3)
    ((text, docs),) = asked
    wanted = expected(run, made)
    assert text == list(wanted.main.text) and len(docs) == len(wanted.docs) == len(made.given)
    for read, trained in zip(docs, wanted.docs, strict=True):
        check_equal(read, trained)


def test_a_question_is_asked_as_in_tuning(run, item, monkeypatch):
    asked, generate = [], instruction_answers.generate_answers

    def listen(generator, instructions, *args, **options):
        asked.extend(instructions)
        return generate(generator, instructions, *args, **options)

    monkeypatch.setattr(instruction_answers, "generate_answers", listen)
    made = item("what")
    found = run.ask(made.picture, made.fields["question"], docs=0, num=3, temperature=1.0)
    wanted = expected(run, made)
    start, _ = wanted.answer
    assert asked[0].answer[0] == start
    assert list(asked[0].main.text[:start]) == list(wanted.main.text[:start])
    np.testing.assert_array_equal(asked[0].main.codes, wanted.main.codes)
    assert len(found.answers) == 3 and found.neighbors == []
    assert found.mean_log_probs == sorted(found.mean_log_probs, reverse=True)
    (read,) = run.ask(made.picture, made.fields["question"]).neighbors
    assert 0 < read["score"] <= 1.001


def test_documents_come_before_a_structure_and_are_found_by_names(run, item, monkeypatch):
    structure, seen = item("from_edges").given[0], []
    generate_codes = tasks.generate_codes
    monkeypatch.setattr(
        tasks,
        "generate_codes",
        lambda *args, **o: seen.append(args[2][0]) or generate_codes(*args, **o),
    )
    name = run.memory.document(0).text
    drawn = run.generate(name, structure=structure, feature="edges")
    assert [d["id"] for d in drawn.neighbors] == [run.generate(name, docs=1).neighbors[0]["id"]]
    assert len(seen[0]) == 2
    np.testing.assert_array_equal(seen[0][1].codes, run.image_tokenizer.encode(structure[None])[0])
    found = run.generate("on red", boxes=[("apple", (0, 0, 8, 8))]).neighbors
    assert found == run.generate("apple on red", docs=1).neighbors


def test_two_conditions_guide_an_edit(run, picture):
    """Weights of 1 are plain sampling, those of 0 leave a condition out; the images stand as documents."""
    options = dict(num=2, seed=3, temperature=1.0)
    plain = run.edit(picture, EDIT, **options).images
    assert same(run.edit(picture, EDIT, guidance=1, image_guidance=1, **options).images, plain)
    unread = [run.edit(picture, text, guidance=0, **options).images for text in (EDIT, "pear")]
    assert same(*unread) and not same(unread[0], plain)
    other = 255 - picture
    blind = [
        run.edit(image, EDIT, guidance=0, image_guidance=0, **options).images
        for image in (picture, other)
    ]
    assert same(*blind) and not same(blind[0], unread[0])
    codes = run.image_tokenizer.encode(picture[None])[0]
    marked = tasks.token_documents.pair(run.generator.vocabulary.encode_text("edit"), codes)
    by_hand = tasks.generate_codes(
        run.generator,
        [run.generator.vocabulary.encode_text(EDIT)] * 2,
        [[marked]] * 2,
        tasks.make_seeds(3, 2),
        tasks.sampler.Sampling(1.0),
        steering=Guidance(2.0, documents_weight=1.5, plausible=0.1),
    )
    guided = run.edit(picture, EDIT, guidance=2, image_guidance=1.5, plausible=0.1, **options)
    assert same(guided.images, run.image_tokenizer.decode(by_hand.codes))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda run, p: run.edit(p, " "), "The prompt is empty"),
        (lambda run, p: run.edit(p, "a " * 60), "The prompt has"),
        (lambda run, p: run.edit("a.png", EDIT), "is a path; open it"),
        (lambda run, p: run.edit(p, EDIT, second=np.zeros(3)), "An image has the shape"),
        (lambda run, p: run.edit(p, EDIT, guidance=-1), "guidance weight is -1"),
        (lambda run, p: run.edit(p, EDIT, image_guidance=float("nan")), "image guidance is nan"),
        (lambda run, p: run.edit(p, EDIT, num=0), "num is 0"),
        (lambda run, p: run.edit(p, EDIT, seed=-1), "seed is -1"),
        (lambda run, p: run.ask(p, ""), "The question is empty"),
        (lambda run, p: run.ask(p, "what " * 60), r"The question is \d+ tokens too long"),
        (lambda run, p: run.ask(p, "what?", docs=3), "reads 0 to 2 documents, not 3"),
        (lambda run, p: run.generate("", boxes=[("a", (0, 0, 33, 9))]), "Box 1, 'a', is .* of 32 x 32"),
        (lambda run, p: run.generate("", boxes=[("a " * 60, (0, 0, 9, 9))]), "with its boxes has"),
        (lambda run, p: run.generate("a", structure=p[:20]), "has 32 x 20 pixels, but the image has 32 x 32"),
        (lambda run, p: run.generate("a", structure=p, feature="depth"), "'depth', but .* edges and silh"),
        (lambda run, p: run.generate("a", structure=p, docs=2), "0 to 1 documents beside the given pic"),
        (lambda run, p: run.generate("a", structure=p, boxes=[("a", (0, 0, 9, 9))]), "give one of them"),
    ],
)  # fmt: skip
def test_a_bad_instruction_is_one_sentence(run, picture, ask, says):
    with pytest.raises(UserError, match=says):
        ask(run, picture)


@pytest.mark.parametrize(
    "ask",
    [
        lambda run, p: run.edit(p, EDIT),
        lambda run, p: run.edit(p, EDIT, second=p),
        lambda run, p: run.ask(p, "what?"),
        lambda run, p: run.generate("a", boxes=[("a", (0, 0, 9, 9))]),
        lambda run, p: run.generate("a", structure=p),
    ],
)
def test_a_decoder_that_was_not_tuned_says_which_was(called_tuned, picture, ask):
    untuned = rag_mm.load(str(called_tuned))
    with pytest.raises(UserError, match=r"was not tuned on .*stage sft, --stage=sft"):
        ask(untuned, picture)


def test_the_commands_give_the_same(run, called_tuned, picture, item, tmp_path, capsys):
    def call(*words):
        assert main.main([*words, f"--workdir={called_tuned}", "--seed=4", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def pixels(path):
        return np.asarray(PIL.Image.open(path))

    out, sheet = f"--out={tmp_path / 'x.png'}", tmp_path / "sheet.png"
    structure = item("from_edges").given[0]
    for name, image in (("a", picture), ("b", 255 - picture), ("s", structure)):
        PIL.Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "boxes.json").write_text('[{"name": "pear", "box": [0, 0, 8, 16]}]')
    image = f"--image={tmp_path / 'a.png'}"
    weights = ("--guidance=2", "--image-guidance=1.5", f"--sheet={sheet}")
    edited = call("edit", image, f"--image={tmp_path / 'b.png'}", "--prompt=swap", *weights, out)
    drawn = run.edit(
        picture, "swap", second=255 - picture, seed=4, guidance=2.0, image_guidance=1.5
    )
    assert same(pixels(edited["images"][0]), drawn.images[0])
    assert edited["sheet"] == str(sheet) and pixels(sheet).shape[1] > 3 * 96
    told = call("ask", image, "--question=what is it?", "--num=2", "--temperature=1")
    found = run.ask(picture, "what is it?", num=2, temperature=1.0, seed=4)
    assert told == {
        "answers": found.answers,
        "mean_log_probs": found.mean_log_probs,
        "neighbors": found.neighbors,
    }
    words = (
        "generate",
        "--prompt=on red",
        f"--boxes={tmp_path / 'boxes.json'}",
        "--best-of=2",
        out,
    )
    boxed = call(*words, f"--sheet={sheet}")
    drawn = run.generate("on red", boxes=[("pear", (0, 0, 8, 16))], best_of=2, seed=4)
    assert same(pixels(boxed["images"][0]), drawn.images[0])
    assert boxed["neighbors"] == drawn.neighbors and len(drawn.neighbors) == 1
    np.testing.assert_allclose(boxed["scores"], drawn.scores)
    words = (
        "generate",
        "--prompt=pear",
        f"--structure={tmp_path / 's.png'}",
        "--feature=edges",
        out,
    )
    drawn = run.generate("pear", structure=structure, feature="edges", seed=4)
    assert same(pixels(call(*words)["images"][0]), drawn.images[0])
