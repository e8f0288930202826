"""Training and decoding compared with transformers, at the smallest sizes."""

import json

import numpy as np
import pytest

from rag_mm.cli import main


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--widths", "33"),
        ("train", "--batch=0"),
        ("train", "--against=nobody"),
        ("decode", "--new=152"),
        ("decode", "--batches", "0"),
        ("decode", "--against=unguarded"),
        ("train", "--size=tiny"),
    ],
    ids=" ".join,
)
def test_sizes_that_mean_nothing_are_refused(capsys, words):
    assert main.main(["bench", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def run(capsys, *words):
    sizes = ["--widths", "64", "--layers=1", "--length=24", "--rounds=1", "--json"]
    assert main.main(["bench", *words, *sizes]) == 0
    cases = json.loads(capsys.readouterr().out)
    for case in cases.values():
        assert case["ratio"] == pytest.approx(case["ours"] / case["peer"]) and case["ours"] > 0
        assert case["machine"] and {"torch", "transformers", "jax"} <= set(case["versions"])
    return cases


@pytest.mark.parity
def test_both_sides_begin_at_the_same_loss(capsys):
    """That of guessing: the work is the same, to the token."""
    cases = run(capsys, "train", "--against=transformers", "--batch=4", "--no-compiled")
    assert set(cases) == {"64_eager"}
    losses = [cases["64_eager"][key] for key in ("our_loss", "peer_loss")]
    np.testing.assert_allclose(losses, np.log(2_944), rtol=0.02)


@pytest.mark.parity
def test_a_case_a_batch_size_and_one_for_two_streams(capsys):
    cases = run(capsys, "decode", "--batches", "1", "2", "--new=8")
    assert set(cases) == {"batch_1", "batch_2", "two_streams"}
    assert cases["two_streams"]["unit"] == "s"
