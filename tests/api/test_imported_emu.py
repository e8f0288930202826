"""An imported Emu: prompts of any order, texts by greedy and beam search, images, and what it refuses."""

import json
import pathlib
import sys

import jax
import numpy as np
import public_instructions
import pytest
from flax import nnx

import rag_mm
from rag_mm.api import asked_emu, emu_suites, imported_emu, importing
from rag_mm.core.errors import UserError
from rag_mm.decode import image_rollout

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "convert"))
import tiny_emu_folder

IMAGES = list(np.random.default_rng(0).integers(0, 256, (9, 10, 14, 3)).astype(np.uint8))
IMG, END, SLOT = 14, 15, 16


def load(place, is_instruct, max_len=96):
    config = tiny_emu_folder.make_config(is_instruct)
    config["decoder"]["max_position_embeddings"] = max_len
    folder = tiny_emu_folder.write(place / "theirs", config)
    importing.import_checkpoint("emu", folder, place / "run")
    return rag_mm.load(place / "run")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def base(base_folder):
    return load(base_folder, False)


def test_a_prompt_of_texts_images_and_a_clip(base):
    prompt = base.prompt([IMAGES[0], "two dog", [9, 3], IMAGES[1:3]])
    image = [IMG, SLOT, SLOT, SLOT, END]
    assert prompt.row.tokens.tolist() == [1, *image, 9, 7, 9, 3, *image, *image]
    assert prompt.vectors.shape == (9, 16)
    np.testing.assert_allclose(prompt.vectors[3:6], base.encode_image(IMAGES[1:2])[0], atol=1e-5)
    assert np.abs(prompt.vectors[:3] - prompt.vectors[3:6]).max() > 0.01


def test_texts_after_prompts_of_different_lengths(base):
    prompts = [base.prompt([IMAGES[0], "is it a dog ?"]), base.prompt(["what is it"])]
    greedy = base.complete(prompts, num_tokens=4)
    swapped = base.complete(prompts[::-1], num_tokens=4)
    assert greedy.tokens[1] == swapped.tokens[0] and len(greedy.texts) == 2
    beams = base.complete(prompts, num_tokens=4, num_beams=5, length_penalty=1.0)
    assert len(beams.tokens) == 2
    sampled = [base.complete(prompts, num_tokens=4, temperature=1.0, seed=s).tokens for s in (0, 1)]
    assert sampled[0] != sampled[1]
    for tokens in (*greedy.tokens, *beams.tokens, *sampled[0]):
        assert not set(tokens) & {13, IMG, END, SLOT}


def test_captions_and_answers_are_texts(base):
    captions = base.caption([IMAGES[0], IMAGES[1:3]], num_tokens=4)
    answers = base.answer(IMAGES[:2], ["what is it ?", "is it a cat ?"], num_tokens=4)
    assert [type(each) for each in (*captions, *answers)] == [str] * 4


def test_images_after_prompts(base):
    prompts = [base.prompt([]), base.prompt([IMAGES[0], "a red dog"])]
    found = base.imagine(prompts)
    assert found.shape == (2, 3, 16) and np.isfinite(found).all()
    np.testing.assert_allclose(base.imagine(prompts[::-1])[1], found[0], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_what_is_refused(base):
    with pytest.raises(UserError, match="9 frames; give at most 8"):
        base.prompt([IMAGES])
    with pytest.raises(UserError, match="special token such as"):
        base.prompt(["a [IMG] dog"])
    for ids, says in (([3, SLOT], f"hold {SLOT}, a token of images"), ([3, 99], "outside the")):
        with pytest.raises(UserError, match=says):
            base.prompt([IMAGES[0], ids])
    long = base.prompt([[*range(3, 13)] * 9 + [3, 4, 3]])
    for call in (
        lambda: base.complete([long], num_tokens=6),
        lambda: base.imagine([long, long]),
    ):
        with pytest.raises(UserError, match="maximum sequence length of 96"):
            call()
    with pytest.raises(UserError, match="temperature=0 with several"):
        base.complete([base.prompt([])], num_beams=2, temperature=1.0)
    with pytest.raises(UserError, match="at least one"):
        base.complete([])


def test_the_instruct_model_answers_but_writes_no_image(tmp_path):
    model = load(tmp_path, True)
    assert model.is_instruct
    with pytest.raises(UserError, match="instruct model, which does not write images"):
        model.imagine([model.prompt(["a dog"])])
    row = model._around("[USER]: ", IMAGES[0], " [ASSISTANT]:").row
    assert row.tokens.tolist()[1:3] == [17, 0]


@pytest.mark.parametrize("is_instruct", [False, True])
def test_suites_ask_an_imported_emu(tmp_path, monkeypatch, is_instruct):
    load(tmp_path, is_instruct, max_len=192)
    vqa, coco = (tmp_path / name for name in ("vqa", "coco"))
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 16, "height": 8} for i in range(3)]
    texts = [{"id": i, "image_id": i, "caption": "is it a red dog ?"} for i in range(3)]
    content = public_instructions.INFO | {"images": images, "annotations": texts}
    public_instructions.put(coco / "annotations" / "captions_val2017.json", content)
    for i, image in enumerate(images):
        picture = coco / "val2017" / image["file_name"]
        public_instructions.put(picture, public_instructions.pixels(i))
    path = public_instructions.questions(vqa) / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked = json.loads(path.read_text())
    asked["questions"].insert(1, asked["questions"][0])
    path.write_text(json.dumps(asked))
    spec, prompts = f"vqav2:{vqa}", []
    ask = imported_emu.ImportedEmu.prompt
    monkeypatch.setattr(
        imported_emu.ImportedEmu,
        "prompt",
        lambda emu, parts: (
            prompts.append([p for p in parts if isinstance(p, str)]) or ask(emu, parts)
        ),
    )
    found = emu_suites.evaluate(tmp_path / "run", "vqa", spec)
    assert found["stage"] == "imported" and found["n"] == 2
    config = emu_suites.EmuSuiteConfig(prompts="paper", shots=1, examples=f"coco-captions:{coco}")
    found = emu_suites.evaluate(tmp_path / "run", "caption", f"coco-captions:{coco}", config)
    assert found["shots"] == 1 and len(found["answers"]) > 1
    said = " ".join(prompts[-1])
    assert ("[USER]" in said) == is_instruct == said.endswith("the image depicts a photo of")
    assert said.count("[ASSISTANT]") == (2 if is_instruct else 0)
    dialogs = public_instructions.dialogs(tmp_path / "visdial")
    found = emu_suites.evaluate(tmp_path / "run", "visdial", f"visdial:{dialogs}")
    assert found["mrr"]["n"] == 2


def test_a_candidate_scores_its_log_probability(base, base_folder):
    emu = asked_emu.load(base_folder / "run", None)
    prompt = emu.prompt([([IMAGES[0], "what is it ?"], None)], "", 0)
    candidates = ["a dog", "two", "is it a red dog ?"]
    scores = emu.score(prompt, candidates)
    # By hand: one pass over the whole sequence of one candidate, without padding.
    for text, score in zip(candidates, scores, strict=True):
        own = [*base.text_ids(text), base.config.ids.end]
        whole = base.prompt([IMAGES[0], "what is it ?", own[:-1]])
        mixture = image_rollout.stack_prompts([whole.row], [whole.vectors])
        decoder = nnx.merge(base.graphdef, base.params).decoder
        hidden = decoder(mixture.tokens, mixture.positions, mixture.segment_ids)
        log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)[0], axis=-1))
        first = len(whole.row.tokens) - len(own) + 1
        places = np.arange(first - 1, len(whole.row.tokens))
        wanted = log_probs[places, own].sum() / len(whole.row.tokens)
        assert score == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UserError, match="no memory"):
        emu.prompt([([IMAGES[0]], None)], "", 2)
    with pytest.raises(UserError, match="stage=emu is for runs trained here"):
        asked_emu.load(base_folder / "run", "emu")
