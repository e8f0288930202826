"""`rag-mm import` and `rag-mm export` as a user types them."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from etils import epath

import rag_mm
from rag_mm.cli import export, main
from rag_mm.convert import shards
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny


def command(capsys, *words):
    code = main.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("llama") / "a", "llama_gqa", max_bytes=20_000)


@pytest.mark.parametrize("name", ["llama_gqa", "chameleon", "clip_legacy"])
def test_import_then_export_gives_the_checkpoint_back(tmp_path, capsys, name):
    family = tiny.CHECKPOINTS[name][0]
    folder = tiny.write(tmp_path / "a", name, tiny.BFLOAT16, max_bytes=20_000)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "README.md").write_text("Not ours to carry.")
    code, made = command(capsys, "import", family, folder, f"--out={tmp_path / 'run'}")
    assert code == 0 and made["dtypes"] == ["bfloat16"] and made["tensors"] > 20
    code, back = command(
        capsys, "export", family, tmp_path / "run", tmp_path / "b", "--shard-size=30KB"
    )
    assert code == 0 and len(back["files"]) > 1 and back["bytes"] == made["bytes"]
    first, second = (shards.open_folder(epath.Path(tmp_path / side)) for side in "ab")
    assert set(first) == set(second)
    for tensor in first:
        a, b = shards.read_tensor(first[tensor]), shards.read_tensor(second[tensor])
        assert a.dtype == b.dtype == tiny.BFLOAT16
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))
    for side in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "b" / side).read_text()) == json.loads(
            (folder / side).read_text()
        )
    assert not (tmp_path / "b" / "README.md").exists()
    if family == "llama":
        assert rag_mm.load(str(tmp_path / "run")).stop_tokens == (7, 8)


def test_a_cast_is_written_into_the_config(tmp_path, capsys, checkpoint):
    code, _ = command(capsys, "import", "llama", checkpoint, f"--out={tmp_path / 'run'}")
    assert code == 0
    words = ("export", "llama", tmp_path / "run", tmp_path / "b", "--dtype=float16")
    code, back = command(capsys, *words)
    assert code == 0 and back["dtypes"] == ["float16"] and back["files"] == ["model.safetensors"]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float16"


def no_config(folder):
    (folder / "config.json").unlink()


def other_family(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "mistral"}))


def cut_short(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def absent_file(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def strange_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_config, "config.json does not exist"),
        (other_family, "holds a 'mistral' checkpoint, not 'llama'"),
        (cut_short, "is truncated"),
        (absent_file, "which is not in"),
        (only_pickles, "is a pickle file"),
        (strange_tokenizer, "no readable tokenizer"),
    ],
)
def test_a_bad_checkpoint_gives_one_sentence_and_writes_nothing(
    tmp_path, capsys, checkpoint, spoil, reason
):
    folder = shutil.copytree(checkpoint, tmp_path / "a")
    spoil(folder)
    code, message = command(capsys, "import", "llama", folder, f"--out={tmp_path / 'run'}")
    assert (
        code == 2 and reason in message and message.count("\n") == 1 and "Traceback" not in message
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_small_disk_is_refused(tmp_path, capsys, checkpoint, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, message = command(capsys, "import", "llama", checkpoint, f"--out={tmp_path / 'run'}")
    assert code == 2 and "GB free" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("import", "bert", "a", "--out=run"), "There is no family 'bert'"),
        (("import", "llama", "absent", "--out=run"), "is not a folder"),
        (("import", "llama", "a", "--out=run", "--dtype=int8"), "--dtype=int8 is not supported"),
        (("export", "llama", "absent", "b"), "is not a run"),
        (("export", "bert", "absent", "b"), "There is no family 'bert'"),
        (("export", "llama", "absent", "b", "--shard-size=big"), "--shard-size=big is not a size"),
    ],
)
def test_a_bad_argument_gives_one_sentence(tmp_path, capsys, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    code, message = command(capsys, *words)
    assert code == 2 and reason in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_existing_output_is_never_overwritten(tmp_path, capsys, checkpoint):
    run, out = tmp_path / "run", tmp_path / "b"
    assert command(capsys, "import", "llama", checkpoint, f"--out={run}")[0] == 0
    code, message = command(capsys, "import", "llama", checkpoint, f"--out={run}")
    assert code == 2 and "already exists" in message
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    code, message = command(capsys, "export", "llama", run, out)
    assert code == 2 and "already exists" in message and (out / "mine.txt").read_text() == "kept"
    code, message = command(capsys, "export", "clip", run, tmp_path / "c")
    assert code == 2 and "holds a llama checkpoint, not clip" in message
    assert not (tmp_path / "c").exists()


def test_an_interrupted_import_is_not_a_run_and_starts_over(
    tmp_path, capsys, checkpoint, monkeypatch
):
    run = tmp_path / "run"
    words = ("import", "llama", checkpoint, f"--out={run}")
    with monkeypatch.context() as patch:

        def die(*args):
            raise KeyboardInterrupt

        patch.setattr(shards, "write_at", die)
        assert command(capsys, *words)[0] == 130
    with pytest.raises(UserError, match="an unfinished stage"):
        rag_mm.load(str(run))
    assert command(capsys, *words)[0] == 0
    assert rag_mm.load(str(run)).config.num_layers == 3


def test_an_edited_run_is_refused(tmp_path, capsys, checkpoint):
    run = tmp_path / "run"
    assert command(capsys, "import", "llama", checkpoint, f"--out={run}")[0] == 0
    path = run / "language_model" / "frozen" / "params.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was edited after it was done"):
        rag_mm.load(str(run))


def test_commands_for_trained_runs_refuse_imported_ones(tmp_path, capsys, checkpoint):
    run = tmp_path / "run"
    assert command(capsys, "import", "llama", checkpoint, f"--out={run}")[0] == 0
    words = ("generate", f"--workdir={run}", "--prompt=x", f"--out={tmp_path / 'x.png'}")
    code, message = command(capsys, *words)
    assert code == 2 and "is an imported checkpoint" in message
    model = rag_mm.load(str(run))
    for wrong, reason in (("text", "without a tokenizer"), ([[]], "is empty"), ([[99]], "outside")):
        with pytest.raises(UserError, match=reason):
            model.generate(wrong, num_tokens=8)
    with pytest.raises(UserError, match="maximum sequence length"):
        model.generate([[1]], num_tokens=64)
    with pytest.raises(UserError, match="seed is -1; give an integer of at least 0"):
        model.generate([[1]], num_tokens=2, seed=-1)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 gb", 1_500_000_000), ("7KB", 7000)]
)
def test_sizes(text, size):
    assert export.parse_size(text) == size
