"""Every command on a finished run: bad input gives one sentence and exit code 2, and writes nothing."""

import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from rag_mm.cli import main

CONFIG = "--config=configs/quickstart.py:tiny"
GENERATE = "generate --workdir=RUN --prompt=apple --out=x.png"
CAPTION = "caption --workdir=RUN --image=good.png"
INFILL = "infill --workdir=RUN --image=good.png --prompt=apple --rows=8:16 --out=x.png"
EDIT = "edit --workdir=RUN --image=good.png --prompt=apple --out=x.png"
ASK = "ask --workdir=RUN --image=good.png --question=what?"
SCENES = "--documents=scenes:easy/held_out/test"
BUILD = f"memory build {SCENES} --retriever=RUN --out=mem"


def listing(*folders: pathlib.Path) -> list[tuple[str, int, int]]:
    """Every file with its size and modification time."""
    paths = sorted(path for folder in folders for path in folder.rglob("*"))
    paths = [
        path for path in paths if path.name != ".lock"
    ]  # The lock file is opened but stays empty.
    sizes = [(path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]
    return [
        (str(path), *size) for path, size in zip(paths, sizes, strict=True) if not path.is_dir()
    ]


def huge_png() -> bytes:
    """A PNG of 100 bytes whose header declares 2^62 pixels."""
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    pieces = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in pieces
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def desk(tmp_path, tiny_run, monkeypatch) -> pathlib.Path:
    """The current folder: the finished run as RUN, valid and invalid images, an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(tiny_run.workdir)
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.png").write_bytes(b"")
    PIL.Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "huge.png").write_bytes(huge_png())
    return tmp_path


@pytest.fixture
def refused(desk, tiny_run, capsys):
    """Runs a command that must fail with a user error; returns the message."""

    def call(*words: str) -> str:
        before = listing(desk, tiny_run.workdir)
        assert main.main([*words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("rag-mm: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n"))
        assert "Traceback" not in err
        assert listing(desk, tiny_run.workdir) == before
        return err

    return call


@pytest.fixture
def answer(capsys):
    """Runs a command that must succeed; returns its JSON object, which is all of stdout."""

    def call(*words: str) -> dict:
        assert main.main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "command", ["caption --workdir=RUN", INFILL, EDIT, ASK, "memory search RUN/memory"]
)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.png", "no.png cannot be read: No such file"),
        ("empty", "empty cannot be read: Is a directory"),
        ("text.png", "text.png is not a JPEG, PNG or WebP image"),
        ("cut.png", "cut.png is damaged"),
        ("huge.png", "huge.png has more than 67,108,864 pixels"),
        ("good.png/x.png", "Not a directory"),
    ],
)
def test_an_unreadable_image(refused, command, name, says):
    assert says in refused(*command.split(), f"--image={name}")


@pytest.mark.parametrize("command", [GENERATE, INFILL, EDIT])
@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x.jpg", "is not a PNG file"),
        ("no/x.png", "no folder no"),
        ("good.png/x.png", "no folder good.png"),
        (".", "is not a PNG file"),
    ],
)
def test_an_output_that_cannot_be_written(refused, command, out, says):
    """No user can write to a path below a file, not even root."""
    assert says in refused(*command.split(), f"--out={out}")


@pytest.mark.parametrize("command", [GENERATE, CAPTION, INFILL])
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--docs=7", "reads 0 to 2 documents, not 7"),
        ("--docs=-1", "--docs=-1 is negative"),
        ("--docs=two", "--docs: invalid int value"),
        ("--num=0", "--num is 0"),
        ("--num=1000000000", "give 1 to 4,096"),
        ("--num=1.5", "--num: invalid int value"),
        ("--seed=-1", "--seed=-1 is negative"),
        ("--temperature=-1", "--temperature=-1.0 is out of range"),
        ("--temperature=nan", "--temperature=nan is out of range"),
        ("--temperature=inf", "--temperature=inf is out of range"),
        ("--top-p=2", "--top-p=2.0 is out of range"),
        ("--top-p=0", "--top-p=0.0 is out of range"),
        ("--top-p=nan", "--top-p=nan is out of range"),
        ("--documents=no", "no is not a folder"),
        ("--documents=empty", "captions.jsonl cannot be read"),
        ("--workdir=no", "no is not a run"),
        ("--workdir=good.png", "good.png is not a run"),
        ("--stage=sft", "no stage 'sft'; run rag-mm train"),
        ("--stage=tokenizer", "stage 'tokenizer' of RUN has no decoder"),
        ("--stage=S", "'S' is no name of a stage"),
        ("--bogus=1", "Unknown argument '--bogus=1'"),
    ],
)
def test_a_bad_value_for_generate_caption_and_infill(refused, command, word, says):
    assert says in refused(*command.split(), word)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (GENERATE.replace("apple", ""), "prompt is empty"),
        (INFILL.replace("apple", ""), "prompt is empty"),
        (f"{GENERATE} --best-of=0", "--best-of is 0"),
        (f"{GENERATE} --best-of=1000000000", "give 1 to 4,096"),
        (f"{GENERATE} --best-of=1025 --num=4", "give 1 to 1,024"),
        (f"{GENERATE} --guidance=-1", "guidance weight is -1.0"),
        (f"{GENERATE} --guidance=2 --null=full", "null is 'full'; give one of"),
        (f"{GENERATE} --null=bare", "there is no guidance and no contrast"),
        (f"{GENERATE} --plausible=0.1", "there is no guidance"),
        (f"{GENERATE} --contrast=0", "contrast k is 0"),
        (f"{GENERATE} --contrast=1 --amateur-temperature=0", "amateur temperature is 0"),
        (f"{GENERATE} --guidance=2 --contrast=1", "but best_of is 1; give 2 or more"),
        (f"{GENERATE} --decoding=parallel", "decoding is 'parallel'; give one of"),
        (f"{GENERATE} --sheet=x.jpg", "--sheet=x.jpg is not a PNG file"),
        (f"{GENERATE} --structure=text.png", "text.png is not a JPEG, PNG or WebP image"),
        (f"{GENERATE} --structure=good.png", "no stage 'sft'; run rag-mm train"),
        (f"{GENERATE} --structure=good.png --stage=decoder", "was not tuned on structures"),
        (f"{GENERATE} --structure=good.png --boxes=b.json", "not allowed with"),
        (f"{GENERATE} --boxes=no.json", "no.json cannot be read: No such file"),
        (f"{GENERATE} --boxes=good.png", "good.png is not a JSON list"),
        (f"{EDIT} --sheet=no/x.png", "--sheet=no/x.png: there is no folder no"),
        (f"{EDIT} --seed=-1", "--seed=-1 is negative"),
        (f"{EDIT} --num=0", "--num is 0"),
        (f"{EDIT} --docs=1", "Unknown argument '--docs=1'"),
        (f"{EDIT} --image-guidance=much", "--image-guidance: invalid float value"),
        (f"{EDIT} --image=good.png --image=good.png", "There are 3 images; give one or two"),
        (EDIT, "no stage 'sft'; run rag-mm train"),
        (f"{EDIT} --stage=decoder", "was not tuned on edits of one picture"),
        (f"{EDIT} --image=good.png --stage=decoder", "not tuned on edits with a second picture"),
        (ASK, "no stage 'sft'; run rag-mm train"),
        (f"{ASK} --stage=decoder", "was not tuned on questions"),
        (f"{ASK} good.png", "Unknown argument 'good.png'"),
        (f"{ASK} --docs=-1", "--docs=-1 is negative"),
        (f"{INFILL} --rows=5:9", "give multiples of 4"),
        (f"{INFILL} --rows=16:8", "the first less than the second"),
        (f"{INFILL} --rows=8:64", "an image of 32 rows"),
        (f"{INFILL} --rows=top", "is not START:END"),
        (f"{INFILL} --rows=nan:8", "is not START:END"),
        ("generate --workdir=RUN --prompt=a", "required: --out"),
        ("caption --workdir=RUN", "required: --image"),
        ("edit --workdir=RUN --image=good.png --out=x.png", "required: --prompt"),
        ("ask --workdir=RUN --image=good.png", "required: --question"),
        ("infill --workdir=RUN --image=good.png --prompt=a --out=x.png", "required: --rows"),
    ],
)
def test_a_bad_value_for_one_of_them(refused, command, says):
    assert says in refused(*command.split(" "))


def test_a_prompt_longer_than_the_model_reads(refused):
    assert "shorten it" in refused(*GENERATE.split(), f"--prompt={'apple ' * 60}")


@pytest.mark.parametrize("command", ["quickstart", "train"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--config=configs/no.py", "no config 'configs/no.py'"),
        ("--config=good.png", "is not a Python file"),
        ("--config=configs/quickstart.py:no", "no preset 'no'; it has quick, full, tiny"),
        (f"{CONFIG} --config.decoder.lop=1", "no key 'decoder.lop'"),
        (f"{CONFIG} --config.seed=a", "--config.seed=a does not fit"),
        (f"{CONFIG} --config.seed=-1", "seed is -1"),
        (f"{CONFIG} --config.world.class_share=nan", "does not fit"),
        (f"{CONFIG} --config.world.class_share=0", "class_share is 0.0"),
        (f"{CONFIG} --config.world.levels=('hard',)", "unknown level 'hard'"),
        (f"{CONFIG} --config.stages=", "no stages"),
        (f"{CONFIG} --config.stages=tokenizer,paint", "no stage 'paint'"),
        (f"{CONFIG} --config.stages=tokenizer,memory", "no stage 'retriever'"),
        (f"{CONFIG} --config.tokenizer.batch_size=0", "batch_size is 0"),
        (f"{CONFIG} --config.tokenizer.loop.num_steps=0", "num_steps is 0"),
        (f"{CONFIG} --config.retriever.splits=rare", "splits are ('rare',)"),
        (f"{CONFIG} --config.retriever.optimizer.schedule=x", "schedule is one of"),
        (f"{CONFIG} --config.memory.index=x", "no index 'x'"),
        (
            f"{CONFIG} --config.decoder.sequences.num_docs_weights=1,1",
            "num_docs_weights has 2 values",
        ),
        (f"{CONFIG} --config.decoder.model.num_heads=5", "num_heads is 5"),
        (f"{CONFIG} --config.decoder.optimizer.learning_rate=-1", "learning_rate is -1.0"),
        (f"{CONFIG} --config.generation.num_seen=0", "num_seen is 0"),
        (f"{CONFIG} --workdir=good.png", "good.png cannot be created"),
        (f"{CONFIG} --workdir=good.png/run", "cannot be created: Not a directory"),
        (f"{CONFIG} --workdir=", "--workdir is empty"),
        (f"{CONFIG} --workdir=RUN --config.tokenizer.batch_size=3", "batch_size was"),
        (f"{CONFIG} --bogus", "Unknown argument '--bogus'"),
    ],
)
def test_a_bad_chain(refused, command, words, says):
    assert says in refused(command, "--workdir=new", *words.split(" "))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"{CONFIG} --workdir=new --stage=no", "no stage 'no'"),
        (f"{CONFIG} --workdir=new --stage=decoder", "no stage 'tokenizer'"),
        (CONFIG, "required: --workdir"),
        ("--workdir=new", "required: --config"),
    ],
)
def test_a_bad_stage(refused, words, says):
    assert says in refused("train", *words.split())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("memory", "ACTION"),
        ("memory polish RUN/memory", "polish"),
        (f"{BUILD} --retriever=no", "There is no run no"),
        (f"{BUILD} --retriever=empty", "empty is not a run"),
        (f"{BUILD} --documents=no", "no is not a folder"),
        (f"{BUILD} --documents=empty", "captions.jsonl cannot be read"),
        (f"{BUILD} --documents=scenes:easy/none/test", "no split 'none'"),
        (f"{BUILD} --index=x", "no index 'x'"),
        (f"{BUILD} --out=good.png/mem", "good.png/mem cannot be written"),
        (f"{BUILD} --out=good.png", "good.png cannot be written"),
        (f"{BUILD} --out=RUN", "--out=RUN already holds a run"),
        (f"{BUILD} --out=RUN/memory", "is a memory already"),
        ("memory add no --documents=empty", "no is not a memory"),
        ("memory add RUN/memory --documents=no", "no is not a folder"),
        ("memory add RUN/memory --documents=scenes:easy/held_out/memory", "have the id"),
        ("memory search RUN/memory", "--text"),
        ("memory search RUN/memory --text=", "--text is empty"),
        ("memory search RUN/memory --text=a --image=good.png", "not allowed with"),
        ("memory search RUN/memory --text=a --view=x", "no view 'x'"),
        ("memory search RUN/memory --text=a -k 0", "-k is 0"),
        ("memory search RUN/memory --text=a -k nan", "-k"),
        ("memory search no --text=a", "no is not a memory"),
        ("memory search RUN --text=a", "RUN is a run; give its memory, RUN/memory"),
        ("memory verify RUN", "RUN is a run"),
        ("memory verify no", "no is not a folder"),
        ("memory verify empty", "empty is not a memory"),
        ("memory stats good.png", "good.png is not a memory"),
        ("doctor --workdir=no", "no is not a folder"),
        ("doctor --workdir=good.png", "good.png is not a folder"),
        ("doctor --bogus", "Unknown argument '--bogus'"),
        ("pictures", "no command 'pictures'"),
        ("generat --workdir=RUN", "did you mean 'generate'"),
    ],
)
def test_a_bad_memory_doctor_or_command(refused, command, says):
    assert says in refused(*command.split())


@pytest.fixture
def stages_of(tiny_run, desk):
    """Copies chosen stages of the finished run into a new run; its folder's name."""

    def copy(*stages: str) -> str:
        target = desk / "some"
        target.mkdir()
        shutil.copy(tiny_run.workdir / "config.json", target)
        for stage in stages:
            shutil.copytree(tiny_run.workdir / stage, target / stage)
        return "some"

    return copy


@pytest.mark.parametrize("command", [GENERATE, CAPTION, INFILL])
def test_a_run_that_is_not_finished(refused, stages_of, desk, command):
    run = stages_of("tokenizer", "retriever", "memory", "decoder")
    words = [*command.split(), f"--workdir={run}"]
    manifest = desk / run / "decoder" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    assert "an unfinished stage 'decoder'" in refused(*words)
    shutil.rmtree(manifest.parent)
    assert "no stage 'decoder'" in refused(*words)


def test_a_retriever_that_is_not_finished(refused, stages_of):
    words = [*BUILD.split(), f"--retriever={stages_of('tokenizer')}"]
    assert "no stage 'retriever'" in refused(*words)


def test_a_decoder_with_the_codes_of_another_tokenizer(refused, answer, stages_of, tiny_run, desk):
    """`train --stage` trains only the other tokenizer, which then replaces the right one."""
    other = [CONFIG, "--workdir=other", "--config.seed=1", "--config.tokenizer.loop.num_steps=2"]
    metrics = answer("train", *other, "--stage=tokenizer")["metrics"]
    assert set(metrics) == {"tokenizer", "machine"}
    assert {path.name for path in (desk / "other").iterdir() if path.is_dir()} == {"tokenizer"}
    run = stages_of("retriever", "memory", "neighbors", "decoder", "control")
    shutil.copytree(desk / "other" / "tokenizer", desk / run / "tokenizer")
    for command in (GENERATE, CAPTION, INFILL):
        message = refused(*command.split(), f"--workdir={run}")
        assert "was trained on codes of tokenizer" in message
    message = refused("quickstart", CONFIG, f"--workdir={run}")
    assert "Stage 'tokenizer' was built with another config" in message


def save_documents(folder: pathlib.Path, first: int, count: int) -> None:
    """A folder of single-color images, their captions, and a line that is not a record."""
    folder.mkdir()
    lines = ["not a record"]
    for i in range(first, first + count):
        color = np.random.default_rng(i).integers(256, size=3, dtype=np.uint8)
        PIL.Image.fromarray(np.tile(color, (20, 30, 1))).save(folder / f"color {i}.v1.png")
        record = {"image": f"color {i}.v1.png", "caption": f"color number {i}"}
        lines.append(json.dumps(record | {"url": f"example.org/{i}", "license": "CC0-1.0"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def test_a_memory_of_user_images(answer, refused, desk):
    """Built with the run's retriever and storing a copy, so it is searched and extended without the run."""
    save_documents(desk / "some", 0, 6)
    save_documents(desk / "more", 6, 2)
    built = answer("memory", "build", "--documents=some", "--retriever=RUN", "--out=mem")
    assert (built["rows"], built["codes_per_image"], built["index"]) == (6, 64, "scann")
    assert [reject["name"] for reject in built["rejected"]] == ["line 1"]
    (desk / "RUN").unlink()
    added = answer("memory", "add", "mem", "--documents=more")
    assert (added["rows"], added["version"], added["added"]) == (8, 2, 2)
    result = answer("memory", "search", "mem", "--image=more/color 7.v1.png", "-k", "3")
    assert result["view"] == "image" and len(result["hits"]) == 3
    best = result["hits"][0]
    assert set(best) >= {"id", "score", "text", "image"}
    assert (best["id"], best["text"]) == ("color 7.v1", "color number 7")
    assert (best["url"], best["license"]) == ("example.org/7", "CC0-1.0")
    assert best["score"] == pytest.approx(1.0, abs=1e-3)
    assert best["image"].startswith("data:image/png;base64,")
    assert len(answer("memory", "search", "mem", "--text=color", "-k", "99")["hits"]) == 8
    assert answer("memory", "verify", "mem") == {"memory": "mem", "ok": True, "problems": []}
    assert answer("memory", "stats", "mem")["rows"] == 8
    assert "is a memory already" in refused(
        "memory", "build", "--documents=some", "--retriever=mem/retriever", "--out=mem"
    )


def test_the_memory_of_a_run(answer, desk):
    assert answer("memory", "verify", "RUN/memory")["problems"] == []
    stats = answer("memory", "stats", "RUN/memory")
    assert (stats["version"], stats["index"]) == (2, "exact")
    hits = answer("memory", "search", "RUN/memory", "--text=apple", "-k", "4")["hits"]
    assert len(hits) == 4 and all(hit["id"].startswith("easy-") for hit in hits)


def test_a_tampered_memory_exits_1(capsys, desk, tiny_run):
    shutil.copytree(tiny_run.workdir / "memory", desk / "mem")
    path = desk / "mem" / "v000002" / "ids-00000.json"
    path.write_text(path.read_text().replace("easy", "hard"))
    assert main.main(["memory", "verify", "mem", "--json"]) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "ids-00000.json" in json.loads(out)["problems"][0]


def test_doctor_checks_the_disk_of_the_run(capsys, desk):
    main.main(["doctor", "--workdir=RUN", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["disk_free_gb"] > 0
