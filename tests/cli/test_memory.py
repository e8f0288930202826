"""`rag-mm memory`: JSON keys that scripts rely on, exit codes, and one-sentence user errors."""

import base64
import io
import json
import pathlib
import time

import fresh_python
import numpy as np
import PIL.Image
import pytest
import rich.console
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.cli import main, memory
from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann_config
from rag_mm.memory.writing import writer


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def load(kind):
        def from_folder(folder, image_batch=None):
            if not (pathlib.Path(folder) / "config.json").exists():
                raise UserError(f"There is no model in {folder}.")
            return kind()

        return from_folder

    monkeypatch.setattr(memory, "load_encoder", load(StandInEncoder))
    monkeypatch.setattr(memory, "load_tokenizer", load(StandInTokenizer))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run with both models, a folder of 5 images and one of 2 more."""
    monkeypatch.chdir(tmp_path)
    for name in ("retriever", "tokenizer"):
        (tmp_path / "run" / name / "frozen").mkdir(parents=True)
        (tmp_path / "run" / name / "frozen" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    for folder, documents in (("some", make_documents(5)), ("more", make_documents(2, 5))):
        (tmp_path / folder).mkdir()
        lines = []
        for document in documents:
            PIL.Image.fromarray(document.image).save(tmp_path / folder / f"{document.id}.png")
            lines.append(json.dumps({"image": f"{document.id}.png", "caption": document.text}))
        lines.append(json.dumps({"image": "missing.png", "caption": "a"}))
        (tmp_path / folder / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def call(capsys, *argv: str) -> dict:
    assert main.main(["memory", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_build_search_add_verify_stats(world, capsys):
    built = call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem")
    assert (built["rows"], built["codes_per_image"], built["index"]) == (5, 4, "scann")
    assert [reject["name"] for reject in built["rejected"]] == ["missing.png"]
    found = call(capsys, "search", "mem", "--text=thing number3", "--view=text", "-k", "2")
    assert [set(hit) >= {"id", "score", "text", "image"} for hit in found["hits"]] == [True] * 2
    assert found["hits"][0]["id"] == "doc-003"
    assert found["hits"][0]["text"] == "thing number3"
    png = base64.b64decode(found["hits"][0]["image"].removeprefix("data:image/png;base64,"))
    pixels = np.asarray(PIL.Image.open(io.BytesIO(png)))
    np.testing.assert_array_equal(pixels, make_documents(1, 3)[0].image)
    by_image = call(capsys, "search", "mem", "--image=some/doc-001.png")
    assert (by_image["view"], by_image["hits"][0]["id"]) == ("image", "doc-001")
    assert call(capsys, "search", "mem", "--text=a", "-k", "99")["view"] == "mixed"
    added = call(capsys, "add", "mem", "--documents=more")
    assert (added["rows"], added["added"], added["version"]) == (7, 2, 2)
    hits = call(capsys, "search", "mem", "--image=more/doc-006.png", "-k", "9")["hits"]
    assert (len(hits), hits[0]["id"]) == (7, "doc-006")
    assert call(capsys, "verify", "mem") == {"memory": "mem", "ok": True, "problems": []}
    assert call(capsys, "stats", "mem")["rows"] == 7
    (world / "mem" / "CURRENT").write_text("v000002\n")
    assert main.main(["memory", "verify", "mem", "--json"]) == 1
    assert "CURRENT is damaged" in json.loads(capsys.readouterr().out)["problems"][0]


def test_remove_merge_compact(world, capsys):
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem")
    removed = call(capsys, "remove", "mem", "--id=doc-001", "--id=doc-003")
    assert (removed["rows"], removed["taken_out"], removed["version"]) == (3, 2, 2)
    hits = call(capsys, "search", "mem", "--text=thing number3", "-k", "9")["hits"]
    assert {hit["id"] for hit in hits} == {"doc-000", "doc-002", "doc-004"}
    call(capsys, "build", "--documents=more", "--retriever=run", "--out=other")
    assert call(capsys, "merge", "mem", "other")["rows"] == 5
    compacted = call(capsys, "compact", "mem", "--prune")
    assert (compacted["rows"], compacted["removed"], compacted["version"]) == (5, 0, 4)
    assert not (world / "mem" / "v000001").exists()
    assert call(capsys, "verify", "mem")["ok"]


def test_search_by_document_and_a_contact_sheet(world, capsys):
    lines = (world / "some" / "captions.jsonl").read_text().splitlines()
    evil = {"caption": "<script>alert(1)</script>", "url": "javascript:alert(1)"}
    lines[2] = json.dumps(json.loads(lines[2]) | evil)
    (world / "some" / "captions.jsonl").write_text("\n".join(lines))
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem", "--index=device")
    for view in ("image", "text", "mixed"):
        found = call(capsys, "search", "mem", "--document=doc-002", f"--view={view}", "-k", "1")
        assert found["hits"][0]["id"] == "doc-002"
    found = call(capsys, "search", "mem", "--image=some/doc-001.png", "--html=hits.html")
    assert found["html"] == "hits.html"
    page = (world / "hits.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 5
    assert "<script" not in page and "&lt;script&gt;" in page
    assert 'href="javascript' not in page


def test_rejected_and_excluded_records_are_counted_and_listed(world, capsys):
    lines = (world / "some" / "captions.jsonl").read_text().splitlines()
    (world / "some" / "captions.jsonl").write_text("\n".join([*lines, "{"]))
    argv = ["memory", "build", "--documents=some", "--retriever=run", "--out=mem"]
    assert main.main([*argv, "--rejects=bad.jsonl"]) == 2
    complaint = capsys.readouterr().err
    assert "2 of 7 records are bad, more than --max-bad=0.01 allows" in complaint
    assert "1 missing-picture, 1 not-json" in complaint
    assert not (world / "mem").exists()
    listed = [json.loads(line) for line in (world / "bad.jsonl").read_text().splitlines()]
    assert [(r["name"], r["reason"]) for r in listed] == [
        ("missing.png", "missing-picture"),
        ("line 7", "not-json"),
    ]
    built = call(capsys, *argv[1:], "--max-bad=0.5", "--exclude=more")
    assert built["rejected_by_reason"] == {"missing-picture": 1, "not-json": 1}
    assert (built["rows"], built["excluded"]) == (5, {})
    rejects = world / "mem" / "v000001" / "rejects.jsonl"
    assert rejects.read_text() == (world / "bad.jsonl").read_text()
    call(capsys, "add", "mem", "--documents=more")
    some = call(capsys, *argv[1:-1], "--out=few", "--max-bad=0.5", "--exclude=some/../more")
    assert some["rows"] == 5
    PIL.Image.fromarray(make_documents(1, 6)[0].image).save(world / "some" / "copy.png")
    lines[4] = json.dumps({"image": "copy.png", "caption": "another name"})
    (world / "some" / "captions.jsonl").write_text("\n".join(lines))
    kept = call(capsys, *argv[1:-1], "--out=kept", "--exclude=more")
    assert (kept["rows"], kept["excluded"]) == (4, {"excluded-picture": 1})
    assert main.main(["memory", "verify", "mem"]) == 0


def test_a_memory_does_not_need_the_run_after_its_build(world, capsys):
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem", "--index=exact")
    for path in sorted((world / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert call(capsys, "search", "mem", "--text=a")["hits"]
    assert call(capsys, "add", "mem", "--documents=more")["rows"] == 7


def test_a_retriever_without_a_tokenizer_gives_no_codes(world, capsys):
    retriever = "--retriever=run/retriever/frozen"
    built = call(capsys, "build", "--documents=some", retriever, "--out=mem")
    assert built["codes_per_image"] is None
    assert call(capsys, "add", "mem", "--documents=more")["rows"] == 7


def test_both_models_get_the_image_batch(world, capsys, monkeypatch):
    given, load_encoder, load_tokenizer = [], memory.load_encoder, memory.load_tokenizer
    monkeypatch.setattr(memory, "load_encoder", lambda *a: given.append(a[1]) or load_encoder(*a))
    monkeypatch.setattr(
        memory, "load_tokenizer", lambda *a: given.append(a[1]) or load_tokenizer(*a)
    )
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem", "--image-batch=16")
    call(capsys, "add", "mem", "--documents=more", "--image-batch=32")
    assert given == [16, 16, 32, 32]


def test_scenes_as_documents(world, capsys):
    spec = "--documents=scenes:easy/nothing/memory"
    assert main.main(["memory", "build", spec, "--retriever=run", "--out=mem"]) == 2
    assert "nothing" in capsys.readouterr().err
    documents = memory.open_documents("scenes:easy/held_out/test")
    assert documents[0].id.startswith("easy-")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "ACTION"),
        (["polish", "mem"], "polish"),
        (["build", "--documents=some", "--out=new"], "--retriever"),
        (["build", "--documents=some", "--retriever=no", "--out=new"], "There is no run no"),
        (["build", "--documents=no", "--retriever=run", "--out=new"], "no is not a folder"),
        (["build", "--documents=some", "--retriever=some", "--out=new"], "no model in some"),
        (["build", "--documents=some", "--retriever=run", "--out=mem"], "is a memory already"),
        (["build", "--documents=some", "--retriever=run", "--out=run"], "already holds a run"),
        (
            ["build", "--documents=some", "--retriever=run", "--out=new", "--index=x"],
            "no index 'x'",
        ),
        (
            ["build", "--documents=some", "--retriever=run", "--out=some/doc-001.png/new"],
            "doc-001.png",
        ),
        (["add", "mem", "--documents=some"], "Two documents have the id 'doc-000'"),
        (["add", "no", "--documents=more"], "no is not a memory"),
        (["search", "mem"], "--text"),
        (["search", "mem", "--text=a", "--image=b"], "not allowed"),
        (["search", "mem", "--text=a", "-k", "0"], "-k is 0"),
        (["search", "mem", "--text=a", "-k", "1000000000000"], "give 1 to 1,000,000"),
        (["search", "mem", "--text=a", "-k", "x"], "-k"),
        (["search", "mem", "--text=a", "--view=x"], "no view 'x'"),
        (["search", "mem", "--image=no.png"], "no.png cannot be read"),
        (["search", "mem", "--image=some/captions.jsonl"], "is not a JPEG"),
        (["search", "no", "--text=a"], "no is not a memory"),
        (["search", "mem", "--document=no"], "no document with the id 'no'"),
        (["remove", "mem"], "Nothing to remove"),
        (["remove", "mem", "--license=MIT"], "no document with the license 'MIT'"),
        (["merge", "mem", "no"], "no is not a memory"),
        (["merge", "mem", "mem"], "Both memories have the id"),
        (["add", "mem", "--documents=more", "--max-bad=2"], "--max-bad is 2.0"),
        (["add", "mem", "--documents=more", "--exclude=no"], "no is not a folder"),
        (["add", "mem", "--documents=more", "--image-batch=0"], "--image-batch is 0"),
        (
            ["build", "--documents=some", "--retriever=run", "--out=new", "--image-batch=-1"],
            "--image-batch is -1",
        ),
        (["verify", "no"], "no is not a folder"),
        (["stats", "some"], "some is not a memory"),
        (["show", "mem"], "--document"),
        (["show", "mem", "--document=no"], "no document with the id 'no'"),
        (["add-codes", "mem", "--tokenizer=more"], "--tokenizer=more is not a run"),
        (["add-codes", "mem", "--image-batch=0"], "--image-batch is 0"),
        (["add-codes", "no"], "no is not a memory"),
    ],
)
def test_a_user_error_is_one_sentence_and_writes_nothing(world, capsys, argv, complaint):
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem", "--index=exact")
    before = sorted(world.rglob("*"))
    assert main.main(["memory", *argv]) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(world.rglob("*")) == before


def test_text_output(world, capsys):
    def shown(*argv: str) -> str:
        result = call(capsys, *argv)
        console = rich.console.Console(file=io.StringIO(), width=120)
        memory.show(result, console)
        return console.file.getvalue()

    built = shown("build", "--documents=some", "--retriever=run", "--out=mem")
    assert "skipped missing.png (missing-picture): cannot be read" in built
    assert "doc-003" in shown("search", "mem", "--text=thing number3")
    assert "no problems found" in shown("verify", "mem")
    assert "codes_per_image" in shown("stats", "mem")


def test_documents_of_any_segments_are_shown_with_the_codes_of_two_tokenizers(
    world, capsys, monkeypatch
):
    segments = [
        {"text": "[then]"},
        {"video": ["doc-000.png", "doc-001.png"], "fps": 8},
        {"image": "doc-002.png"},
    ]
    lines = world / "some" / "captions.jsonl"
    line = json.dumps({"id": "clip", "segments": segments, "license": "CC0"})
    lines.write_text(f"{lines.read_text()}\n{line}")
    call(capsys, "build", "--documents=some", "--retriever=run", "--out=mem")
    shown = call(capsys, "show", "mem", "--document=clip")
    assert (shown["id"], shown["row"], shown["license"]) == ("clip", 5, "CC0")
    own = StandInTokenizer().fingerprint
    assert shown["segments"] == [
        {"text": "[then]"},
        {"video": [2, 8, 8], "fps": 8.0, "codes": {own: [2, 4]}},
        {"image": [8, 8], "codes": {own: [4]}},
    ]
    monkeypatch.setattr(memory, "load_tokenizer", lambda *_: StandInTokenizer("another one"))
    added = call(capsys, "add-codes", "mem", "--tokenizer=run")
    assert (added["version"], added["more_codes"]) == (2, {"another one": 4})
    assert added["added_codes"] == "another one"
    shown = call(capsys, "show", "mem", "--document=clip")
    assert shown["segments"][1]["codes"] == {own: [2, 4], "another one": [2, 4]}
    console = rich.console.Console(file=io.StringIO(), width=120)
    memory.show(shown, console)
    output = console.file.getvalue()
    assert "0 text: [then]\n" in output
    assert "1 video: 2 x 8 x 8 at 8 frames per second\n" in output
    assert "    2 x 4 codes of another one\n" in output
    assert call(capsys, "verify", "mem")["ok"]


def test_help_is_quick():
    began = time.monotonic()
    assert not fresh_python.modules_loaded_by("rag_mm.cli.memory") & {"jax", "scann", "PIL"}
    assert time.monotonic() - began < 5  # Far above an idle machine's time, below jax's.


def test_what_scann_logs_stays_off_the_terminal(tmp_path):
    """A hashed index, which ScaNN logs about where it is trained."""
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "config.json").write_text("{}")
    hashed = writer.Options(scann=scann_config.ScannConfig(scoring="hashed"))
    carried = {"retriever": tmp_path / "frozen"}
    path = tmp_path / "mem"
    retrieval_memory.Memory.build(
        path, make_documents(40), StandInEncoder(), carried=carried, options=hashed
    )
    program = pathlib.Path(__file__).parent / "programs" / "memory_command.py"
    for words in (
        ("remove", path, "--id", "doc-003"),
        ("compact", path),
        ("search", path, "--text=thing number7"),
    ):
        done = fresh_python.run(program, *words)
        assert (done.returncode, done.stderr) == (0, "")
    assert "number7" in done.stdout
