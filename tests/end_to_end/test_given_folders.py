"""The papers' set-up by commands: frozen CLIP, image tokenizer and memory are given, a decoder is trained."""

import json
import pathlib
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tokenizers

import rag_mm
from rag_mm.cli import main
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import world_config

sys.path.append(str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny
import tiny_tokenizers

TRAIN = [
    "train",
    "--config=configs/own_images.py:tiny",
    "--workdir=mine",
    "--config.world.documents=pictures",
    "--config.decoder.loop.num_steps=20",
    "--config.decoder.loop.checkpoint_every=20",
    "--config.decoder.optimizer.warmup_steps=2",
    "--config.decoder.num_watched=4",
]
GIVEN = [
    "--config.retriever.folder=runs/clip",
    "--config.tokenizer.folder=runs/vq",
    "--config.tokenizer.text.folder=text",
    "--config.memory.folder=mem",
]


def call(capsys, *words: str) -> dict:
    code = main.main([*words, "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys, *words: str) -> str:
    assert main.main(list(words)) == 2
    return capsys.readouterr().err


def write_documents(folder: pathlib.Path, rows: range) -> list[str]:
    """Scenes as pictures of several sizes, captions, and the captions' texts."""
    scenes = world_config.EmojiWorld(class_share=0.02).scenes("memory", "common")
    folder.mkdir()
    captions = [scenes.full_caption(row) for row in rows]
    for row in rows:
        PIL.Image.fromarray(scenes.image(row)).resize((40 + row % 7, 40)).save(
            folder / f"p{row}.png"
        )
    lines = [
        json.dumps({"image": f"p{row}.png", "caption": caption, "license": "CC0"})
        for row, caption in zip(rows, captions, strict=True)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return captions


def write_text_tokenizers(folder: pathlib.Path, captions: list[str]) -> None:
    """A CLIP's word tokenizer beside its weights, and a byte-level BPE as GPT-2's."""
    words = sorted({word for caption in captions for word in caption.split()})[:26]
    ids = {"<unk>": 0} | {word: i for i, word in enumerate(words, 1)}
    clip = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    clip.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    clip.save(str(folder / "clip" / "tokenizer.json"))
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text.train_from_iterator(captions, trainer)
    (folder / "text").mkdir()
    text.save(str(folder / "text" / "tokenizer.json"))


@pytest.mark.slow
def test_given_models_and_a_given_memory_train_and_generate_by_commands(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    captions = write_documents(tmp_path / "pictures", range(40))
    write_documents(tmp_path / "others", range(30, 90))
    tiny.write(tmp_path / "clip", "clip")
    tiny_tokenizers.write(tmp_path / "vq", "janus_vq")
    write_text_tokenizers(tmp_path, captions)
    call(capsys, "import", "clip", "clip", "--out=runs/clip")
    call(capsys, "import", "image-tokenizer", "vq", "--out=runs/vq")
    build = ("memory", "build", "--documents=others", "--retriever=runs/clip", "--out=mem")
    assert call(capsys, *build, "--index=exact")["rows"] == 60

    metrics = call(capsys, *TRAIN, *GIVEN)["metrics"]
    assert metrics["memory"]["rows"] == 60 and metrics["retriever"].keys() == {"recall_at_1"}
    logged = pathlib.Path("mine/decoder/log.jsonl").read_text().splitlines()
    assert json.loads(logged[-1])["loss"] < json.loads(logged[0])["loss"]
    manifests = {
        name: json.loads(pathlib.Path(f"mine/{name}/manifest.json").read_text())
        for name in ("tokenizer", "retriever", "memory")
    }
    assert manifests["retriever"]["inputs"] == {} and not any(
        pathlib.Path(f"mine/{name}/log.jsonl").exists() for name in manifests
    )
    memory = Memory.open("mem")
    assert manifests["memory"]["config"]["folder_fingerprint"] == memory.fingerprint
    # Nobody answers for itself: ten documents are in the memory, too.
    neighbors = np.load("mine/neighbors/train.npy")
    own = {memory.ids.index(f"p{row}"): f"p{row}" for row in range(30, 40)}
    texts = {memory.document(row).text for row in own}
    assert (neighbors >= 0).all() and neighbors.max() < 60 and len(texts) == 10

    draw = ("generate", "--workdir=mine", "--prompt=a flag", "--docs=2")
    drawn = call(capsys, *draw, "--out=x.png")
    assert len(drawn["neighbors"]) == 2 and drawn["neighbors"][0]["license"] == "CC0"
    assert np.asarray(PIL.Image.open("x.png")).shape == (32, 32, 3)

    assert call(capsys, *TRAIN, *GIVEN)["metrics"] == metrics  # Nothing to do.
    said = refused(capsys, *TRAIN, "--config.retriever.folder=runs/vq", *GIVEN[1:])
    assert "retriever: folder=runs/vq cannot be used" in said and "'retriever'" in said
    before = safetensors.numpy.load_file("runs/clip/retriever/frozen/params.safetensors")
    changed = {name: np.asarray(value + 1) for name, value in before.items()}
    safetensors.numpy.save_file(changed, "runs/clip/retriever/frozen/params.safetensors")
    assert "was edited after it was done" in refused(capsys, *TRAIN, *GIVEN)
    said = refused(capsys, *TRAIN, *GIVEN, "--config.retriever.folder=runs/clip/retriever/frozen")
    assert "'retriever' was built with another config" in said

    # The run holds what it needs of the models: without them it is moved, asked and exported.
    shutil.rmtree("runs")
    shutil.move("mine", "moved")
    draw = ("generate", "--workdir=moved", "--prompt=a flag", "--docs=2")
    assert call(capsys, *draw, "--out=y.png")["neighbors"] == drawn["neighbors"]
    assert pathlib.Path("y.png").read_bytes() == pathlib.Path("x.png").read_bytes()
    call(capsys, "export", "clip", "moved", "out", "--card")
    card = pathlib.Path("out/README.md").read_text()
    assert "it was given" in card and "CC0" in card
    assert pathlib.Path("out/tokenizer.json").read_text()
    call(capsys, "export", "cm3", "moved", "decoder")
    # A document that is added to the memory is found; another memory in its place is refused.
    write_documents(tmp_path / "more", range(90, 95))
    call(capsys, "memory", "add", "mem", "--documents=more")
    session = rag_mm.load("moved")
    assert len(session.memory) == 65
    codes = session.memory.read_codes(np.array([64]))
    pixels = session.memory.document(64).image
    fitted = PIL.Image.fromarray(pixels).resize((32, 32), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(codes, session.image_tokenizer.encode(np.asarray(fitted)[None]))
    assert session.infill(pixels, "a flag", (8, 24), docs=1).images.shape == (1, 32, 32, 3)
    assert len(session.caption(pixels, docs=1).neighbors) == 1
    shutil.rmtree("mem")
    assert "is not a memory" in refused(capsys, *draw, "--out=z.png")
