"""The image tokenizer compared with a port to PyTorch, at the smallest size: the same work on both sides."""

import json

import pytest

from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.perf.bench import tokenizer_speed


@pytest.mark.parametrize(
    "words", ["--batch=0", "--rounds=0", "--against=transformers", "--size=huge", "--words=0"]
)
def test_sizes_that_mean_nothing_are_refused(capsys, words):
    assert main.main(["bench", "tokenizer", words]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parity
def test_both_sides_encode_decode_and_learn_alike(capsys):
    small = ["--size=tiny", "--batch=2", "--rounds=1", "--words=128", "--json"]
    assert main.main(["bench", "tokenizer", "--against=torch", *small]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert set(cases) == {"encode", "decode", "train_step", "quantizer"}
    for name, case in cases.items():
        assert case["ratio"] == pytest.approx(case["ours"] / case["peer"]) and case["ours"] > 0
        assert case["machine"] and {"torch", "jax"} <= set(case["versions"])
        if name != "quantizer":
            assert case["error"] <= 1e-4 and case["unit"] == "images/s"
    assert cases["quantizer"]["unit"] == "s" and cases["quantizer"]["memory"] > 0


def test_sides_that_differ_are_not_timed():
    with pytest.raises(UserError, match=r"encode: .* differ by 2.0e-04, more than 1e-04"):
        tokenizer_speed.check("encode", 2e-4)
