"""A finished Emu is tuned on instructions and measured, then asked, talked to, evaluated and exported."""

import io
import json

import numpy as np
import public_instructions
import pytest
import safetensors.numpy

import rag_mm
from rag_mm.api.emu_session import EmuSession
from rag_mm.cli import main
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.core.image_files import encode_png
from rag_mm.data.interleaved import Mark

# 150 seconds of processor time for all tests.
pytestmark = pytest.mark.slow
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
TASKS = {"caption", "what", "where", "which_color"}


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory):
    """A run of `sft_tiny` with the first stages of quickstart:tiny."""
    workdir = tmp_path_factory.mktemp("emu_sft") / "run"
    page = ["train", "--config=configs/emu.py:sft_tiny", f"--workdir={workdir}"]
    assert main.main([*page, f"--reuse={tiny_run.workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def session(tuned):
    return rag_mm.load(str(tuned))


@pytest.fixture
def image(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(IMAGE))
    return tmp_path / "a.png"


def run(capsys, *arguments):
    capsys.readouterr()
    assert main.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_answers_are_measured_before_and_after_and_the_model_is_unchanged(tuned):
    metrics = files.read_json(tuned / "metrics.json")["emu_sft"]
    captions = metrics["captions"]
    assert captions["is_unchanged"] and captions["before"] == captions["adapter_off"]
    assert captions["adapter_on"] != captions["before"]
    for split in ("held_out", "seen"):
        assert metrics[split].keys() >= TASKS
        variants = {"untuned", "tuned", "untuned_retrieved", "tuned_retrieved"}
        assert metrics[split]["where"].keys() == variants
        assert metrics[split]["where"]["tuned"]["n"] == 12
    few = metrics["few_shot_tuned"]
    assert few["what"].keys() == {"none", "rices_2", "random_2"}
    assert few["what_read"]["rices_2"]["mean"] > 0
    assert "what_rices_2_minus_random_2" in few["paired"]


def test_questions_are_answered_by_the_tuned_model(tuned, session, image, capsys):
    found = run(capsys, "ask", f"--workdir={tuned}", f"--image={image}", "--question=what is it?")
    assert len(found["answers"]) == 1 and len(found["neighbors"]) == 1
    again = session.ask(IMAGE, "what is it?")
    assert again.answers == found["answers"]
    assert again.mean_log_probs == pytest.approx(found["mean_log_probs"])
    two = session.ask([IMAGE, IMAGE[::-1]], "what moves?", docs=0, num=2)
    assert len(two.answers) == 2 and two.neighbors == []
    with pytest.raises(UserError, match="The question is empty"):
        session.ask(IMAGE, " ")


def test_a_dialogue_remembers_what_was_said(tuned, image, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n\nwhere is it?\n"))
    found = run(capsys, "chat", f"--workdir={tuned}", f"--image={image}")["messages"]
    assert [each["role"] for each in found] == ["user", "assistant"] * 2
    assert found[0]["content"] == [str(image), "what is it?"]


USER, ASSISTANT = ({"role": role, "content": "what is it?"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "Message 1 has the role 'robot'"),
        ([USER, USER], "do not take turns"),
        ([], "do not take turns"),
        ([USER | {"content": ""}], "Message 1 is empty"),
        (
            [USER, ASSISTANT | {"content": [IMAGE]}, USER],
            "Message 2 of the assistant holds an image",
        ),
    ],
)
def test_bad_dialogues_are_one_sentence(session, messages, message):
    with pytest.raises(UserError, match=message):
        session.chat(messages)


def test_a_long_dialogue_forgets_its_first_turns_but_not_the_image(session, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        EmuSession, "write", lambda _, prompt, *args, **more: prompts.append(prompt) or [""]
    )
    first = USER | {"content": [IMAGE, "what was it?"]}
    session.chat([first, ASSISTANT, *[USER, ASSISTANT] * 8, USER])
    session.chat([first, ASSISTANT, USER])
    long, short = prompts
    assert short[:3] == [Mark.USER, IMAGE, "what was it?"]
    assert long[:3] == [Mark.USER, IMAGE, "what is it?"] and "what was it?" not in long[3:]
    assert 3 < sum(part is Mark.USER for part in long) < 10
    assert long[-2:] == ["what is it?", Mark.ASSISTANT]


def test_suites_ask_with_examples_and_rank_candidates(tuned, tmp_path, capsys):
    vqa = public_instructions.questions(tmp_path / "vqa")
    path = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked = json.loads(path.read_text())
    asked["questions"].insert(1, asked["questions"][0])
    path.write_text(json.dumps(asked))
    spec = f"vqav2:{vqa}"
    found = run(capsys, "eval", "--suite=vqa", f"--workdir={tuned}", f"--documents={spec}")
    assert (found["stage"], found["n"], len(found["answers"])) == ("emu_sft", 2, 2)
    assert set(found["by_answer_type"]) == {"other"}
    dialogs = public_instructions.dialogs(tmp_path / "visdial")
    spec = f"--documents=visdial:{dialogs}"
    found = run(capsys, "eval", "--suite=visdial", f"--workdir={tuned}", spec, "--stage=emu")
    assert found["stage"] == "emu" and found["mrr"]["n"] == 2 and len(found["rejected"]) == 4
    assert all(1 <= rank <= 5 for _, rank in found["answers"])


def test_the_exported_decoder_has_the_updates_merged(tuned, session, tmp_path, capsys):
    found = {}
    for stage in ("emu", "emu_sft"):
        run(capsys, "export", "cm3", tuned, tmp_path / stage, f"--stage={stage}")
        found[stage] = safetensors.numpy.load_file(tmp_path / stage / "model.safetensors")
        assert (tmp_path / stage / "tokenizer.json").exists()
    before, after = found.values()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    # Four maps of each of two layers, and the rows of the two roles.
    assert before.keys() == after.keys() and len(changed) == 4 * 2 + 1
    kernels = session.tuned.emu.model.params["decoder"]["stack"]["blocks"]["attention"]
    q = np.asarray(kernels["q"]["kernel"])
    assert sum(np.array_equal(after[name].ravel(), q[0].ravel()) for name in changed) == 1
