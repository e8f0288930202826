"""Models that a stage takes from a folder: copied as they are, recorded, refused where they do not fit."""

import dataclasses
import json

import PIL.Image
import pytest
import tokenizers
from etils import epath

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.shared import given_models, train_retriever, train_tokenizer

SMALL = {"world.class_share": 0.02, "tokenizer.num_eval": 4, "retriever.num_eval": 4}


def stage_configs(overrides, page="configs/quickstart.py:tiny"):
    return chain_config.stage_configs(chain_config.load(page, SMALL | overrides))


@pytest.fixture
def wrong(tiny_run, tmp_path):
    """Folders by name: models of another kind than asked for, a word tokenizer, and nothing."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    run = tiny_run.workdir
    return {
        "clip": run / "retriever" / "frozen",
        "codes": run / "tokenizer" / "frozen",
        "words": tmp_path / "words",
        "absent": tmp_path / "absent",
        "memory": run / "memory",
    }


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        ("retriever.folder", "codes", "retriever: .* does not contain a model of the family clip"),
        ("retriever.folder", "absent", "retriever: folder=.* there is no such folder"),
        ("retriever.folder", "memory", "retriever: folder=.* is not a run"),
        ("tokenizer.folder", "clip", "tokenizer: .* does not contain a model of the family spae"),
        ("tokenizer.folder", "absent", "tokenizer: folder=.* there is no such folder"),
        ("tokenizer.text.folder", "words", "tokenizer.text: .* is no byte-level BPE"),
        ("tokenizer.text.folder", "absent", "tokenizer.text: folder=.* no such folder"),
        ("memory.folder", "codes", "memory: folder=.* holds no memory"),
        ("memory.folder", "absent", "memory: folder=.* holds no memory"),
    ],
)
def test_a_folder_of_the_wrong_kind_is_refused_before_anything_runs(wrong, key, name, says):
    with pytest.raises(UserError, match=says) as raised:
        stage_configs({key: str(wrong[name])})
    assert "\n" not in str(raised.value)


def test_a_tokenizer_of_another_image_size_is_refused(tiny_run, tmp_path):
    for i in range(4):
        PIL.Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": str(i)}) for i in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    page = chain_config.load("configs/own_images.py:tiny", {"world.documents": str(tmp_path)})
    changes = {"world.image_size": 64, "tokenizer.folder": str(tiny_run.workdir)}
    with pytest.raises(UserError, match="images of 32 pixels, but the world's have 64"):
        chain_config.stage_configs(chain_config.override(page, changes))


def test_a_given_tokenizer_with_its_text_tokenizer_is_the_same_model(tiny_run, tmp_path):
    given = str(tiny_run.workdir)
    config = stage_configs({"tokenizer.folder": given, "tokenizer.text.folder": given})["tokenizer"]
    metrics = train_tokenizer.run(config, None, epath.Path(tmp_path))
    taken, source = (
        train_tokenizer.load_tokenizer(path) for path in (tmp_path / "frozen", tiny_run.workdir)
    )
    assert taken.fingerprint == source.fingerprint == config.folder_fingerprint
    assert metrics["psnr"] > 10 and not (tmp_path / "checkpoints").exists()
    # With more sentinels the texts stay, the codes move up, and it is another model.
    text = dataclasses.replace(config.text, num_sentinels=9)
    train_tokenizer.run(dataclasses.replace(config, text=text), None, epath.Path(tmp_path))
    other = train_tokenizer.load_tokenizer(tmp_path / "frozen")
    assert other.token_ids[0] == source.token_ids[0] + 1
    assert other.vocabulary.encode_text("a red kite") == source.vocabulary.encode_text("a red kite")
    assert other.fingerprint != source.fingerprint


def test_a_given_retriever_is_copied_and_reads_no_other_stage(tiny_run, tmp_path):
    plain = stage_configs({})["retriever"]
    config = stage_configs({"retriever.folder": str(tiny_run.workdir)})["retriever"]
    retriever = chain_config.STAGES["retriever"]
    assert retriever.inputs_for(plain) == ("tokenizer",) and retriever.inputs_for(config) == ()
    metrics = train_retriever.run(config, None, epath.Path(tmp_path))
    assert metrics.keys() == {"recall_at_1"}
    copy = train_retriever.load_encoder(tmp_path / "frozen")
    assert copy.fingerprint == config.folder_fingerprint
    # Manifests of runs without a folder stay what they were.
    assert "folder" not in str(chain_config.slice_of(plain))
    assert chain_config.slice_of(config)["folder_fingerprint"] == copy.fingerprint


def test_a_stages_own_folder_is_a_place_too(tiny_run):
    for place in (tiny_run.workdir, tiny_run.workdir / "retriever"):
        found = given_models.find_model(place, "retriever")
        assert found == epath.Path(tiny_run.workdir) / "retriever" / "frozen"
    with pytest.raises(UserError, match="is not a run"):
        given_models.find_model(tiny_run.workdir / "decoder", "retriever")


def test_a_stage_is_not_given_what_it_would_replace(tiny_run, tmp_path):
    """It is deleted before it is rebuilt."""
    workdir = epath.Path(tiny_run.workdir)
    link = tmp_path / "link"
    link.symlink_to(workdir, target_is_directory=True)
    for place in (workdir, workdir / "retriever", workdir / "retriever" / "frozen", link):
        config = stage_configs({"retriever.folder": str(place)})["retriever"]
        with pytest.raises(UserError, match="retriever: folder=.* is what the stage would replace"):
            given_models.check_outside(config, run_folder.Run(workdir), "retriever")
        given_models.check_outside(config, run_folder.Run(epath.Path(tmp_path)), "retriever")
    text = stage_configs({"tokenizer.text.folder": str(workdir)})["tokenizer"]
    with pytest.raises(UserError, match="tokenizer: folder=.* is what the stage would replace"):
        given_models.check_outside(text, run_folder.Run(workdir), "tokenizer")


def test_a_folder_that_changes_while_it_is_read_is_refused(tiny_run):
    config = stage_configs({"retriever.folder": str(tiny_run.workdir)})["retriever"]
    config.check_unchanged(config.folder_fingerprint)
    with pytest.raises(UserError, match="changed while it was read"):
        config.check_unchanged("another")


def test_another_model_in_the_folder_is_another_config(tiny_run, tmp_path):
    """The manifest names the model by its content, wherever the folder lies."""
    folder = epath.Path(tmp_path) / "clip"
    given_models.copy_model(epath.Path(tiny_run.workdir) / "retriever" / "frozen", folder)
    before = stage_configs({"retriever.folder": str(folder)})["retriever"]
    run = run_folder.Run(epath.Path(tmp_path / "run"))
    write = lambda run, stage_dir: {}
    run_folder.run_stage(run, "retriever", chain_config.slice_of(before), (), write)
    (folder / "vocabulary.json").write_text("{}")
    after = stage_configs({"retriever.folder": str(folder)})["retriever"]
    with pytest.raises(UserError, match=r"another config \(folder_fingerprint was"):
        run_folder.check_stage(run, "retriever", chain_config.slice_of(after))
