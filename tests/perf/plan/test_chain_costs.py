"""Hours and bytes of a chain's commands, against figures reckoned by hand."""

import dataclasses

import pytest

from rag_mm.cli import main
from rag_mm.core import configuration
from rag_mm.core.errors import UserError
from rag_mm.perf import chips
from rag_mm.perf.plan import chain_costs, compile_plan, programs
from rag_mm.perf.plan.chain_costs import ModelCosts
from rag_mm.perf.plan.chain_sizes import ChainSizes

PAGE = configuration.to_dict(configuration.load_config("configs/cm3leon.py:350m"))
V5E = chips.parse_topology("v5e:16x16")  # 256 chips of 197 TFLOP/s and 819 GB/s.
COSTS = ModelCosts(encode=10**11, embed_image=9 * 10**9, embed_text=10**9, dim=512, num_codes=1024)
SIZES = ChainSizes("cm3leon", vocab_size=65_536, code_offset=57_344)


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setattr(chain_costs, "model_costs", lambda sizes: COSTS)


def reckon(count, page=PAGE):
    return chain_costs.reckon(page, count, V5E)


def test_hours_of_encoders_by_hand(models):
    found = reckon(10**9)["commands"]
    second = 256 * 197e12
    assert found["corpus build"]["hours_at_peak"] == pytest.approx(1e20 / second / 3600)
    assert found["memory build"]["hours"] == pytest.approx(1e19 / (0.4 * second) / 3600)
    # Two queries a document, each against 1e9 rows of 512 numbers.
    both = 1e20 + 1e19 + 2 * 2 * 1e18 * 512
    assert found["corpus neighbors"]["flops"] == pytest.approx(both)
    assert found["corpus neighbors"]["hours_at_peak"] == pytest.approx(both / second / 3600)


def test_training_by_hand(models):
    """175,000 steps of 2,048 rows of 4,096 tokens; sequences have one neighbor on average."""
    found = reckon(10**6)
    assert found["tokens"] == 175_000 * 2048 * 4096
    sequences = found["tokens"] / (1 + 2 * (1024 + 32 + 2))
    assert found["passes"] == pytest.approx(sequences / 10**6)
    flops_per_token = found["commands"]["train"]["flops"] / found["tokens"]
    assert 6 * 0.3e9 < flops_per_token < 6 * 0.6e9


def test_a_search_takes_as_long_as_its_rows_are_read(models):
    slow = dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, hbm_bandwidth=1e9))
    found = chain_costs.reckon(PAGE, 2048, slow)["commands"]["corpus neighbors"]
    # Two batches of 1,024 documents, each with a search by text and one by image.
    reading = 4 * 2048 * 512 * 2 / 1e9
    encoding = 2048 * (1e11 + 1e10) / 197e12
    assert found["hours_at_peak"] == pytest.approx((reading + encoding) / 256 / 3600)


def test_bytes_by_hand():
    found = chain_costs.folder_bytes(SIZES, COSTS, 10)
    document = 2 * 1024 + 2 * 32 + 115
    assert found["corpus"] == 10 * document
    assert found["neighbors"] == 10 * (document + 16)
    picture, vectors = 2 * 256 * 256, 2 * 3 * 512 * 4
    assert found["memory"] == 10 * (picture + vectors + 115 + 128)


def test_published_models():
    """CLIP (Radford et al. 2021) and its ViT-B/32 take 4.4 billion multiply-adds an image."""
    found = chain_costs.model_costs(SIZES)
    assert found.embed_image == pytest.approx(2 * 4.4e9, rel=0.02)
    assert found.dim == 512 and found.num_codes == 1024
    larger = chain_costs.model_costs(dataclasses.replace(SIZES, image_size=512, code_size=16))
    assert larger.num_codes == 1024 and larger.encode > 3 * found.encode


def test_mistakes_are_one_sentence_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr(programs, "make_mesh", lambda *_: pytest.fail("compiled"))

    def refused(*words):
        assert main.main(["plan", "--topology=v5e:16x16", *words]) == 2
        return capsys.readouterr().err

    page = "--config=configs/cm3leon.py:7b"
    assert "is no chain" in refused("--config=configs/cm3leon.py:tiny", "--documents=10")
    assert "--documents is 0" in refused(page, "--documents=0")
    assert "leave out --memory" in refused("--memory=10x512", "--documents=10")
    assert "leave out --memory" in refused(page, "--decode", "--documents=10")
    with pytest.raises(UserError, match="code_size is 12; give a power of two"):
        chain_costs.model_costs(dataclasses.replace(SIZES, code_size=12))


def test_what_a_user_reads(capsys, monkeypatch):
    plan = {"fits": True, "collectives": {}, "program": "train"}
    monkeypatch.setattr(compile_plan, "make_plan", lambda *_: plan)
    words = ["plan", "--config=configs/cm3leon.py:350m", "--topology=v5e:16x16"]
    assert main.main([*words, "--documents=1000000"]) == 0
    out = capsys.readouterr().out
    for said in ("corpus neighbors", "hours at 40 %", "1,000,000 documents", "corpus 2.227 GB"):
        assert said in out
