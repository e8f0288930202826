"""Checkpoints whose config and tensors disagree: the tensors win, as in transformers, or the import fails."""

import json
import pathlib
import sys

import numpy as np
import pytest
from etils import epath

import rag_mm
from rag_mm.api import exporting, importing
from rag_mm.convert import shards
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNTIED = tiny.CHECKPOINTS["llama"][1]
TIED = tiny.CHECKPOINTS["llama_tied"][1]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("llama"), "llama")
    specs = shards.open_folder(epath.Path(folder))
    return {name: shards.read_tensor(spec) for name, spec in specs.items()}


def write(folder, values, tensors):
    folder.mkdir()
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    shards.write_folder(folder, shapes, tensors.__getitem__, 1 << 30)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def logits(folder, run):
    importing.import_checkpoint("llama", folder, run)
    return rag_mm.load(str(run)).logits(tiny.tokens((2, 9)))


def test_a_head_of_its_own_is_used_although_the_config_ties_it(tmp_path, tensors):
    found = logits(write(tmp_path / "a", TIED, tensors), tmp_path / "run_a")
    expected = logits(write(tmp_path / "b", UNTIED, tensors), tmp_path / "run_b")
    np.testing.assert_array_equal(found, expected)
    exporting.export_checkpoint("llama", tmp_path / "run_a", tmp_path / "again", max_bytes=1 << 30)
    again = shards.open_folder(epath.Path(tmp_path / "again"))
    np.testing.assert_array_equal(shards.read_tensor(again[HEAD]), tensors[HEAD])


def test_a_tied_table_is_found_under_either_name_or_both(tmp_path, tensors):
    table = tensors[EMBEDDING]
    rest = {name: array for name, array in tensors.items() if name not in (EMBEDDING, HEAD)}
    found = []
    for name, keys in {"a": [EMBEDDING], "b": [HEAD], "c": [EMBEDDING, HEAD]}.items():
        folder = write(tmp_path / name, TIED, rest | dict.fromkeys(keys, table))
        found.append(logits(folder, tmp_path / f"run_{name}"))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    with pytest.raises(UserError, match=f"lacks {HEAD}"):
        logits(write(tmp_path / "d", UNTIED, rest | {EMBEDDING: table}), tmp_path / "run_d")


def test_a_head_that_differs_in_one_bit_of_the_last_value_is_its_own(tmp_path, tensors):
    head = tensors[EMBEDDING].copy()
    head.view(np.uint32)[-1, -1] ^= 1
    folder = write(tmp_path / "a", TIED, tensors | {HEAD: head})
    assert not importing.open_checkpoint("llama", folder).config.tie_embeddings
    folder = write(tmp_path / "b", TIED, tensors | {HEAD: tensors[EMBEDDING]})
    assert importing.open_checkpoint("llama", folder).config.tie_embeddings


def test_a_whole_file_is_read_although_an_index_of_former_shards_remains(tmp_path, tensors):
    folder = write(tmp_path / "a", UNTIED, tensors)
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(shards.open_folder(epath.Path(folder))) == set(tensors)


def test_biases_that_the_config_does_not_name_are_refused(tmp_path, tensors):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    with pytest.raises(UserError, match="holds model.layers.0.self_attn.q_proj.bias"):
        logits(write(tmp_path / "a", UNTIED, tensors | extra), tmp_path / "run")


def test_the_image_processor_is_read_from_either_file(tmp_path):
    def mean(**files):
        folder = tiny.write(tmp_path / str(len(list(tmp_path.iterdir()))), "clip")
        for name, values in files.items():
            (folder / f"{name}.json").write_text(json.dumps(values))
        return importing.open_checkpoint("clip", folder).config.image_mean

    ours, other = dict(image_mean=[0.1, 0.2, 0.3]), dict(image_mean=[0.4, 0.5, 0.6])
    # transformers 5 writes one file, with the image processor inside; before it, the other file.
    assert mean(processor_config={"image_processor": ours}) == (0.1, 0.2, 0.3)
    assert mean(preprocessor_config=ours) == (0.1, 0.2, 0.3)
    both = dict(processor_config={"image_processor": ours}, preprocessor_config=other)
    assert mean(**both) == (0.1, 0.2, 0.3)
    flat = dict(processor_config={"processor_class": "CLIPProcessor"}, preprocessor_config=other)
    assert mean(**flat) == (0.4, 0.5, 0.6)
