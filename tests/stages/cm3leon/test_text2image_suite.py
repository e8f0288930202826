"""`rag-mm eval --suite=text2image` on a tiny run: scenes, COCO's layout and a folder of pictures."""

import json
import pathlib

import PIL.Image
import pytest

from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.stages.cm3leon import text2image_suite
from rag_mm.worlds.emoji import emoji_scenes


def write_documents(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Scenes as a folder with captions.jsonl and as COCO's captions, the last picture damaged."""
    scenes = emoji_scenes.open_documents("easy/common/test")
    pictures = folder / "val2017"
    pictures.mkdir(parents=True)
    entries, annotations, lines = [], [], []
    for i in range(count):
        name = f"{i}.png"
        PIL.Image.fromarray(scenes.image(i)).save(pictures / name)
        entries.append({"id": i, "file_name": name})
        annotations.append({"id": i, "image_id": i, "caption": scenes.full_caption(i)})
        lines.append(json.dumps({"image": name, "caption": scenes.full_caption(i)}))
    (pictures / f"{count - 1}.png").write_bytes(b"no picture")
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    (folder / "annotations").mkdir()
    coco = {"images": entries, "annotations": annotations}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(coco))
    return folder


def evaluate(capsys, run, documents, *options, suite="text2image"):
    words = ["eval", f"--suite={suite}", f"--workdir={run.workdir}", f"--documents={documents}"]
    code = main.main([*words, *options, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_single_samples_and_the_best_of_several(tmp_path, capsys, tiny_run):
    folder = write_documents(tmp_path / "coco", 4)
    found = evaluate(capsys, tiny_run, f"coco-captions:{folder}", "--best-of=3", "--docs=1")
    single, scores = found["single"], ("frechet_own", "kid", "clip_score")
    assert found["n"] == 3 and found["best_of"] == 3 and len(found["rejected"]) == 1
    assert set(scores) <= set(found) and set(scores) == set(single) and "fid" not in found
    assert found["clip_score"]["mean"] > single["clip_score"]["mean"]
    # The same captions and pictures as a folder; the first sample is the single one.
    again = evaluate(capsys, tiny_run, folder / "val2017", "--best-of=1", "--docs=1")
    assert again["single"] == single and again["clip_score"] == single["clip_score"]
    assert found["frechet_own"] > 0


def test_captions_of_a_folder_are_those_of_the_same_pictures_in_cocos_layout(
    tmp_path, capsys, tiny_run
):
    folder = write_documents(tmp_path / "coco", 4)
    coco = evaluate(capsys, tiny_run, f"coco-captions:{folder}", suite="caption")
    plain = evaluate(capsys, tiny_run, folder / "val2017", suite="caption")
    assert plain["cider"] == coco["cider"] and plain["cider"]["n"] == 3
    assert [text for _, text in plain["answers"]] == [text for _, text in coco["answers"]]
    assert [name for name, _ in plain["rejected"]] == ["3.png"]


def test_scenes_and_what_a_user_reads(capsys, tiny_run):
    words = ["eval", "--suite=text2image", f"--workdir={tiny_run.workdir}", "--limit=2"]
    words += ["--documents=scenes:easy/common/test", "--best-of=2", "--docs=0"]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "single" in out and "best of 2" in out and "2 captions" in out


def test_weights_of_the_inception_add_fid(capsys, tiny_run, monkeypatch):
    """Tested with mean colors in place of its features, whose weights `test_inception_format` reads."""
    see = lambda pictures: pictures.mean(axis=(1, 2))
    monkeypatch.setattr(text2image_suite, "_load_inception", lambda path: see)
    options = ("--limit=2", "--best-of=1", "--docs=0", "--inception=weights.safetensors")
    found = evaluate(capsys, tiny_run, "scenes:easy/common/test", *options)
    assert found["fid"] == found["single"]["fid"] > 0 and found["fid"] != found["frechet_own"]


def test_what_is_refused():
    with pytest.raises(UserError, match="best_of is 0; give at least 1"):
        text2image_suite.Text2ImageConfig(best_of=0)
