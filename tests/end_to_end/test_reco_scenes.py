"""RECO on emoji scenes by its commands: trained, evaluated zero-shot, and given other memories."""

import json
import pathlib

import PIL.Image
import pytest

from rag_mm.cli import main
from rag_mm.core import files
from rag_mm.worlds.emoji import emoji_scenes

pytestmark = pytest.mark.slow
SMALL_TINY = {
    "world.class_share": 0.03,
    "world.levels": "easy,free",
    "tokenizer.num_init_images": 128,
    "tokenizer.model.codebook_size": 128,
    "retriever.loop.num_steps": 30,
    "retriever.loop.log_every": 10,
    "retriever.loop.checkpoint_every": 30,
    "retriever.model.embed_dim": 32,
    "retriever.model.vision_layers": 1,
    "retriever.model.text_layers": 1,
    "retriever.batch_size": 64,
    "retriever.num_eval": 64,
    "memory.num_queries": 32,
    "pairs.max_test": 24,
    "fusion.loop.num_steps": 50,
    "fusion.loop.checkpoint_every": 50,
    "fusion.measures.curve_neighbors": "1,",
    "fusion.measures.curve_rows": "1,",
}


def options(overrides: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("scenes") / "run"
    command = ["train", "--config=configs/reco.py:tiny", f"--workdir={workdir}"]
    assert main.main([*command, *options(SMALL_TINY)]) == 0
    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """Twelve scenes in class folders, and as documents with their class as caption."""
    folder = tmp_path_factory.mktemp("images")
    source = emoji_scenes.open_documents("easy/common/test")
    for row in range(12):
        class_folder = folder / source.full_caption(row).split(" at the ")[0].replace(" ", "_")
        class_folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(source.image(row)).save(class_folder / f"{row}.png")
    lines = [
        json.dumps({"image": str(path.relative_to(folder)), "caption": path.parent.name})
        for path in sorted(folder.rglob("*.png"))
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def memory(run, images, tmp_path_factory) -> pathlib.Path:
    """Another memory than the run's: the twelve scenes, encoded by the run's towers."""
    out = tmp_path_factory.mktemp("memory") / "mem"
    build = ["memory", "build", f"--documents={images}", f"--retriever={run}"]
    assert main.main([*build, f"--out={out}", "--index=exact"]) == 0
    return out


@pytest.fixture
def evaluate(run, images, capsys):
    """The result of `rag-mm eval --suite=zeroshot` with other arguments, on the run or another one."""

    def call(*arguments: str, workdir: pathlib.Path = run) -> dict:
        command = ["eval", "--suite=zeroshot", f"--workdir={workdir}", f"--images={images}"]
        capsys.readouterr()
        assert main.main([*command, "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_training_leaves_the_towers_unchanged(run):
    assert files.read_json(run / "metrics.json")["fusion"]["towers_unchanged"] is True


def test_training_measures_every_task(run):
    accuracy = files.read_json(run / "metrics.json")["fusion"]["accuracy"]
    assert {"common", "held_out", "text_to_image", "entities_held_out"} <= set(accuracy)
    assert set(accuracy["entities_harmonic_mean"]) == {"frozen", "both"}
    assert {f"both at {k}" for k in (1, 5, 10)} <= set(accuracy["text_to_image"])


def test_the_gain_is_the_difference_from_the_frozen_model(evaluate):
    result = evaluate()
    assert {"accuracy", "ci95", "n", "frozen", "gain"} <= set(result) and result["n"] == 12
    assert result["gain"] == pytest.approx(result["accuracy"] - result["frozen"])


def test_without_refinement_the_accuracy_is_that_of_the_frozen_model(evaluate):
    refined, frozen = evaluate(), evaluate("--refine=none")
    assert frozen["gain"] == 0 and frozen["accuracy"] == refined["frozen"]


def test_the_page_shows_what_was_retrieved(evaluate, run):
    evaluate()
    assert "Hits of the image" in (run / "eval" / "zeroshot.html").read_text()


def test_another_memory_is_used_by_its_folder_and_changes_nothing_in_the_run(evaluate, memory):
    before = evaluate()
    assert evaluate(f"--memory={memory}", "-k", "3")["memory_rows"] == 12
    assert evaluate() == before


def test_the_towers_of_a_memory_are_enough_to_train_on_documents(
    evaluate, images, memory, tmp_path
):
    workdir = tmp_path / "run"
    command = ["train", "--config=configs/reco.py:clip_b32", f"--workdir={workdir}"]
    overrides = {
        "document_pairs.documents": images,
        "document_pairs.memory": memory,
        "fusion.model.num_heads": 4,
        "fusion.batch_size": 8,
        "fusion.loop.num_steps": 2,
        "fusion.optimizer.warmup_steps": 1,
    }
    assert main.main([*command, *options(overrides)]) == 0
    assert evaluate("--refine=image", workdir=workdir)["memory_rows"] == 12
