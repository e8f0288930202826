"""RECO by its commands: the toy learns to look things up; on scenes, memories are swapped under one model."""

import json

import numpy as np
import PIL.Image
import pytest

from rag_mm.cli import main
from rag_mm.core import configuration, files
from rag_mm.stages import chain
from rag_mm.worlds.emoji import emoji_scenes

SMALL_TOY = {
    "world.num_classes": 40,
    "world.num_common": 20,
    "world.num_held_out": 8,
    "world.dim": 32,
    "toy_pairs.num_train": 4000,
    "toy_fusion.loop.num_steps": 150,
    "toy_fusion.loop.checkpoint_every": 150,
    "toy_fusion.curve_neighbors": "1,",
    "toy_fusion.curve_rows": "1,",
}
SMALL_TINY = {
    "world.class_share": 0.03,
    "world.levels": "easy,free",
    "tokenizer.num_init_images": 128,
    "tokenizer.model.codebook_size": 128,
    "retriever.loop.num_steps": 30,
    "retriever.loop.log_every": 10,
    "retriever.loop.checkpoint_every": 30,
    "retriever.embed_dim": 32,
    "retriever.vision_layers": 1,
    "retriever.text_layers": 1,
    "retriever.batch_size": 64,
    "retriever.num_eval": 64,
    "memory.num_queries": 32,
    "pairs.max_test": 24,
    "fusion.loop.num_steps": 50,
    "fusion.loop.checkpoint_every": 50,
    "fusion.curve_neighbors": "1,",
    "fusion.curve_rows": "1,",
}


def words(overrides: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


@pytest.mark.parametrize("preset", ["toy", "harder_toy", "tiny"])
def test_every_preset_is_a_config(preset):
    page = configuration.to_dict(configuration.load_config(f"configs/reco.py:{preset}"))
    assert list(chain.stage_configs(page)) == page["stages"]


def test_presets_of_public_weights_ask_for_documents_and_a_memory(tmp_path, capsys):
    command = ["train", "--config=configs/reco.py:clip_b32", f"--workdir={tmp_path / 'run'}"]
    assert main.main(command) == 2
    assert "name the training documents and the memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_toy_learns_to_look_up_what_it_never_trained_on(tmp_path, capsys):
    world = {key: SMALL_TOY[key] for key in SMALL_TOY if key.startswith("world.")}
    page = tmp_path / "page.py"
    page.write_text(
        "'''A page: the toy over a smaller world.'''\n"
        "from rag_mm.configs import reco\n"
        "PRESETS = ('toy',)\n"
        "def get_config(preset):\n"
        "    config = reco.toy()\n"
        f"    world = { ({key.split('.')[1]: value for key, value in world.items()})!r}\n"
        "    return config | dict(world=config['world'] | world)\n"
    )
    rest = {key: value for key, value in SMALL_TOY.items() if key not in world}
    run = tmp_path / "run"
    assert main.main(["train", f"--config={page}", f"--workdir={run}", *words(rest)]) == 0
    values = files.read_json(run / "toy_fusion" / "per_document.json")
    held_out = {name: np.mean(hits) for name, hits in values["held_out"].items()}
    assert held_out["both"] > held_out["frozen"] + 0.3
    assert held_out["rows removed"] < held_out["both"] - 0.3
    # The same weights and the same rows, to the bit; and before training there is no difference.
    assert values["held_out"]["rows back"] == values["held_out"]["both"]
    assert values["common"]["step 0"] == values["common"]["frozen"]
    measured = files.read_json(run / "metrics.json")["toy_fusion"]
    assert measured["accuracy"]["held_out"]["both"]["n"] == len(values["held_out"]["both"])
    assert 0 < measured["logit_scale"] <= 100


@pytest.mark.slow
def test_scenes_from_towers_to_swapped_memories(tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "--config=configs/reco.py:tiny", f"--workdir={run}"]
    assert main.main([*command, *words(SMALL_TINY)]) == 0
    measured = files.read_json(run / "metrics.json")["fusion"]
    assert measured["towers_unchanged"] is True
    figures = measured["accuracy"]
    assert {"common", "held_out", "text_to_image", "entities_held_out"} <= set(figures)
    assert set(figures["entities_harmonic_mean"]) == {"frozen", "both"}
    assert {f"both at {k}" for k in (1, 5, 10)} <= set(figures["text_to_image"])

    pictures = tmp_path / "pictures"
    source = emoji_scenes.open_documents("easy/common/test")
    for row in range(0, 12):
        folder = pictures / source.full_caption(row).split(" at the ")[0].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(source.picture(row)).save(folder / f"{row}.png")
    capsys.readouterr()
    asked = ["eval", "--suite=zeroshot", f"--workdir={run}", f"--images={pictures}", "--json"]

    def evaluate(*extra: str) -> dict:
        assert main.main([*asked, *extra]) == 0
        return json.loads(capsys.readouterr().out)

    own, frozen = evaluate(), evaluate("--refine=none")
    assert {"accuracy", "ci95", "n", "frozen", "gain"} <= set(own) and own["n"] == 12
    assert own["gain"] == pytest.approx(own["accuracy"] - own["frozen"])
    assert frozen["gain"] == 0 and frozen["accuracy"] == own["frozen"]
    assert "What the picture found" in (run / "eval" / "zeroshot.html").read_text()

    # Another memory of the same towers, by its folder; and back again.
    (pictures / "captions.jsonl").write_text(
        "\n".join(
            json.dumps({"image": str(path.relative_to(pictures)), "caption": path.parent.name})
            for path in sorted(pictures.rglob("*.png"))
        )
    )
    build = ["memory", "build", f"--documents={pictures}", f"--retriever={run}"]
    assert main.main([*build, f"--out={tmp_path / 'mem'}", "--index=exact"]) == 0
    capsys.readouterr()
    assert evaluate(f"--memory={tmp_path / 'mem'}", "-k", "3")["memory_rows"] == 12
    assert evaluate() == own

    # The memory's own towers are enough to train on documents.
    documents = tmp_path / "documents_run"
    command = ["train", "--config=configs/reco.py:clip_b32", f"--workdir={documents}"]
    settings = {
        "document_pairs.documents": pictures,
        "document_pairs.memory": tmp_path / "mem",
        "document_fusion.model.num_heads": 4,
        "document_fusion.batch_size": 32,
        "document_fusion.loop.num_steps": 2,
        "document_fusion.optimizer.warmup_steps": 1,
    }
    assert main.main([*command, *words(settings)]) == 0
    capsys.readouterr()
    asked[2] = f"--workdir={documents}"
    assert evaluate("--refine=image")["memory_rows"] == 12


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--suite=fewshot --workdir=run --images=x", "invalid choice: 'fewshot'"),
        ("--suite=zeroshot --workdir=run", "arguments --images --dataset is required"),
        ("--suite=zeroshot --workdir=run --images=nothing", "not a folder of class folders"),
        ("--suite=zeroshot --workdir=run --images=. --refine=all", "invalid choice: 'all'"),
        ("--suite=zeroshot --workdir=run --images=pics", "run is not a run"),
        ("--suite=zeroshot --workdir=run --images=pics -k 0", "-k is 0"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, given, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "apple").mkdir(parents=True)
    PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "pics" / "apple" / "0.png")
    assert main.main(["eval", *given.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err
