"""RECO's toy by its command: fusion classifies held-out classes by retrieval, and only by retrieval."""

import pathlib

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.core import files

pytestmark = pytest.mark.slow
PAGE = pathlib.Path(__file__).with_name("small_toy_page.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("toy") / "run"
    assert main.main(["train", f"--config={PAGE}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def correct(run) -> dict:
    """Split -> variant -> whether each query was classified correctly."""
    return files.read_json(run / "fusion" / "per_document.json")


@pytest.fixture(scope="module")
def held_out_accuracy(correct) -> dict[str, float]:
    return {variant: np.mean(values) for variant, values in correct["held_out"].items()}


def test_retrieval_classifies_what_was_never_trained_on(held_out_accuracy):
    assert held_out_accuracy["both"] > held_out_accuracy["frozen"] + 0.3


def test_removing_the_rows_of_held_out_classes_removes_the_gain(held_out_accuracy):
    assert held_out_accuracy["rows removed"] < held_out_accuracy["both"] - 0.3


def test_restoring_the_rows_restores_every_answer(correct):
    assert correct["held_out"]["rows back"] == correct["held_out"]["both"]


def test_before_training_the_answers_are_those_of_the_frozen_model(correct):
    assert correct["common"]["step 0"] == correct["common"]["frozen"]


def test_accuracy_counts_every_query(run, correct):
    measured = files.read_json(run / "metrics.json")["fusion"]
    assert measured["accuracy"]["held_out"]["both"]["n"] == len(correct["held_out"]["both"])


def test_the_logit_scale_stays_in_its_range(run):
    assert 0 < files.read_json(run / "metrics.json")["fusion"]["logit_scale"] <= 100
