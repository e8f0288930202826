"""Which null prompts a decoder knows: by its training's config, or by an earlier run's manifest."""

import json

import pytest
from etils import epath

from rag_mm.core import run_folder
from rag_mm.stages.ra_cm3 import null_prompts
from rag_mm.stages.ra_cm3.training_sequences import MaskingConfig, SequencesConfig

ALL = ["documents", "bare", "caption"]
NEVER, ALWAYS = (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("masking", "weights", "is_baseline", "expected"),
    [
        (dict(), ALWAYS, False, ALL),
        (dict(segment_prob=0.0, caption_prob=0.2), ALWAYS, False, ALL),
        (dict(), NEVER, False, ["documents"]),
        (dict(), NEVER, True, ALL),
        (dict(segment_prob=0.0), ALWAYS, False, ["caption"]),
        (dict(prob=0.0), ALWAYS, False, ["caption"]),
        (dict(max_spans=0), ALWAYS, False, ["caption"]),
        (dict(prob=0.0), NEVER, False, []),
    ],
)
def test_masked_captions_and_sequences_without_documents_show_them(
    masking, weights, is_baseline, expected
):
    sequences = SequencesConfig(num_docs_weights=weights)
    assert null_prompts.shown(MaskingConfig(**masking), sequences, is_baseline) == expected


def make_stage(folder, config):
    run = run_folder.Run(epath.Path(folder))
    run_folder.run_stage(run, "decoder", config, (), lambda *_: {})
    return run.stage_dir("decoder")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(masking={"caption_prob": 0.2}, sequences={"num_docs_weights": [0, 1, 1]}), ["documents"]),
        (dict(masking={}, sequences={}, is_baseline=True), ALL),
        (dict(masking={"caption_prob": "x"}, sequences={}), []),
        (dict(masking=3, sequences={}), []),
        (dict(alpha=0.1), []),
    ],
)  # fmt: skip
def test_an_earlier_record_is_completed_by_the_stages_config(tmp_path, config, expected):
    folder = make_stage(tmp_path, json.loads(json.dumps(config)))
    assert null_prompts.load(folder, {}) == expected
    assert null_prompts.load(folder, {"null_prompts": ["bare", "other"]}) == ["bare"]
    assert null_prompts.load(folder, {"null_prompts": 3}) == expected


def test_without_record_and_manifest_there_are_none(tmp_path):
    assert null_prompts.load(epath.Path(tmp_path) / "decoder", {}) == []
