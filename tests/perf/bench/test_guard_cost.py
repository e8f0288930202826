"""What the guard costs: by the clock, in paired rounds, without PyTorch."""

import json
import math
import pathlib

import fresh_python
import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.perf.bench import timing

SIZES = ["--batch=2", "--layers=1", "--length=8", "--rounds=6", "--steps=2"]


@pytest.mark.slow
def test_a_case_a_width_with_the_interval_of_its_ratio(capsys):
    words = ["bench", "train", "--against=unguarded", "--widths", "32", "64", *SIZES]
    assert main.main([*words, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert set(cases) == {"32_guard", "64_guard"}
    for case in cases.values():
        low, high = case["ci95"]
        assert 0 < low <= case["ratio"] <= high
        assert case["ours"] > 0 and case["peer"] > 0 and case["unit"] == "tokens/s"
        assert case["machine"] and "torch" not in case["versions"]


@pytest.mark.parametrize(
    "words", [("--rounds=5",), ("--steps=0",), ("--no-compiled",), ("--remat=full",)], ids=" ".join
)
def test_what_gives_no_interval_or_says_nothing_is_refused(capsys, words):
    assert main.main(["bench", "train", "--against=unguarded", *words]) == 2
    assert words[0].partition("=")[0] in capsys.readouterr().err


def test_the_interval_has_the_stated_coverage():
    rng = np.random.default_rng(0)
    for count in (6, 20, 41):
        k, tail = 0, 0.0
        while (tail := tail + 2 * math.comb(count, k) / 2**count) <= 0.05:
            k += 1
        values = list(map(float, rng.permutation(count)))
        assert timing.median_interval(values) == (k - 1, count - k)
        held = 0
        for drawn in rng.standard_exponential((2_000, count)):
            low, high = timing.median_interval(drawn)
            held += low <= math.log(2) <= high
        assert held / 2_000 >= 0.945


def test_five_values_have_no_interval():
    with pytest.raises(ValueError, match="at least 6"):
        timing.median_interval([1.0] * 5)


@pytest.mark.slow
def test_they_need_little_beyond_jax():
    """On an image with jax, flax, optax and orbax: none of the other base packages is imported."""
    commands = [
        ["bench", "train", "--against=peak", "--size=tiny", "--steps=1", "--rounds=1"],
        ["bench", "decode", "--against=peak", "--size=tiny", "--rounds=1"],
        ["bench", "train", "--against=unguarded", "--widths", "32", *SIZES],
    ]
    program = pathlib.Path(__file__).parent / "programs" / "bench_with_jax_only.py"
    done = fresh_python.run(program, json.dumps(commands))
    assert done.returncode == 0, done.stderr
