"""Plans without the TPU compiler: topologies, cases from pages, rooflines, the search's order, mistakes."""

import dataclasses
import functools
import json
import types

import pytest

from rag_mm.cli import main
from rag_mm.core import configuration
from rag_mm.nn.block import REMAT
from rag_mm.perf import chips, flops
from rag_mm.perf.plan import cases, compile_plan, decoder_programs, hlo, programs, traffic

V5E = chips.parse_topology("v5e:16x16")


def make_case(name="configs/cm3leon.py:7b", topology=V5E, **options):
    config = configuration.to_dict(configuration.load_config(name))
    return cases.make_case(config, topology, **options)


def test_topologies_are_read():
    assert V5E.num_chips == 256 and V5E.chip is chips.CHIPS["v5e"]
    two = chips.parse_topology("v5p:4x4x4", 2)
    assert two.num_chips == 128 and two.shape == (4, 4, 4)
    assert all(chip.source.startswith("https://") for chip in chips.CHIPS.values())


def test_a_tpu7x_chip_is_two_devices_that_share_its_published_peaks():
    """2307 TFLOP/s, 7380 GB/s, 1200 GB/s in both directions (cloud.google.com/tpu/docs/tpu7x)."""
    found = chips.parse_topology("tpu7x:2x2x1")
    assert found.num_chips == 8
    chip = found.chip
    shared = [2 * each for each in (chip.flops, chip.hbm_bandwidth, 2 * chip.ici_bandwidth)]
    assert shared == [2307e12, 7380e9, 1200e9]
    assert chips.DEVICE_FLOPS["TPU7x"] == chip.flops


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology=v9:2x2"], "There is no chip 'v9'; there are v4, v5e, v5p, v6e, tpu7x."),
        (["--topology=v5e:4x4x4"], "has 3 dimensions; a torus of v5e has 2."),
        (["--topology=big"], "such as v5e:16x16"),
        (["--topology=v5e:16x16", "--batch=100"], "use a multiple of 256"),
        (["--topology=v5e:16x16", "--mesh=1,4,64"], "num_heads is 32, which is not divisible"),
        (["--topology=v5e:16x16", "--mesh=1,2"], "such as 1,256,1"),
        (["--topology=v5e:16x16", "--decode=0"], "at least 1 token"),
        (["--topology=v5e:16x16", "--slices=0"], "--slices is 0"),
        (["--topology=v5e:16x16", "--decode", "--search"], "leave out --decode"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_compiled(capsys, monkeypatch, words, says):
    monkeypatch.setattr(programs, "make_mesh", lambda *_: pytest.fail("compiled"))
    assert main.main(["plan", "--config=configs/cm3leon.py:7b", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_a_page_that_is_no_model_is_refused(capsys):
    words = ["plan", "--config=configs/quickstart.py:tiny", "--topology=v5e:2x2"]
    assert main.main(words) == 2
    assert "plan needs a config page of a single model" in capsys.readouterr().err


def test_the_page_decides_what_the_command_does_not():
    case = make_case()
    assert case.mesh_shape == (1, 256, 1) and case.batch_size == 2048 and case.num_parts == 1
    assert case.model.decoder.remat == "full" and case.model.loss_chunks == 16
    assert case.optimizer.b2 == 0.95
    case = make_case(batch_size=512, remat="dots", num_parts=2, mesh="2,64,2")
    assert case.mesh_shape == (2, 64, 2) and case.model.decoder.remat == "dots"
    # Fewer sequences per chip need fewer chunks, and a sharded vocabulary even fewer.
    assert case.model.loss_chunks == 2
    assert make_case("configs/ra_cm3.py:tiny").mesh_shape == (4, 64, 1)  # its width is 64
    case = make_case(num_new=-1, topology=chips.parse_topology("v5e:2x4"))
    assert case.num_new == 1024 and case.mesh_shape == (1, 1, 8) and case.batch_size == 1


def fake(fits=True, peak=1 << 30, collectives=()):
    return programs.Compiled(fits, peak, 16 << 30, 10, 20, 10, collectives=tuple(collectives))


def report(case, topology, compiled):
    return compile_plan.report(cases.make_program(case, topology), topology, compiled)


def test_the_roofline_is_the_slowest_of_what_a_step_needs():
    case = make_case()
    found = report(case, V5E, fake())
    config = case.model.decoder
    seconds = flops.hardware_flops(config, 4096, True) * 2048 * 4096 / (256 * 197e12)
    assert found["step_seconds"] == found["seconds"]["compute"] == pytest.approx(seconds)
    ratio = flops.train_flops(config, 4096) / flops.hardware_flops(config, 4096, True)
    assert found["mfu_bound"] == pytest.approx(ratio) and found["mfu_bound"] >= 0.6
    slow = hlo.Collective("all-gather", 256, 200e9, 30)
    found = report(case, V5E, fake(collectives=[slow]))
    assert found["step_seconds"] == found["seconds"]["ici"] == pytest.approx(30.0)
    assert found["collectives"]["all-gather"] == 1
    json.dumps(found, allow_nan=False)


def test_slices_pay_for_their_gradients_over_the_network():
    topology = chips.parse_topology("v5e:16x16", 2)
    case = make_case(topology=topology)
    assert case.mesh_shape == (2, 256, 1)
    one_chip = 4 * decoder_programs.count_params(case.model) / 256
    assert traffic.dcn_bytes(case, 2) == pytest.approx(one_chip)
    found = report(case, topology, fake())
    assert found["seconds"]["dcn"] == pytest.approx(one_chip / chips.DCN_BANDWIDTH)


def test_a_program_that_does_not_fit_says_by_how_much():
    found = report(make_case(), V5E, dataclasses.replace(fake(False, 20 << 30), temp_bytes=None))
    assert not found["fits"] and found["over_bytes"] == 4 << 30
    refusals = {
        "Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm.": (25.5, 15.75),
        "memory required for HLO temporaries (8.00T) exceeds available HBM (15.75G).": (
            8192,
            15.75,
        ),
    }
    for text, sizes in refusals.items():
        assert programs.read_refusal(text) == tuple(int(size * (1 << 30)) for size in sizes)
    assert programs.read_refusal("INTERNAL: something else") is None


def search_with(monkeypatch, fits, **options):
    """The search with `fits(remat, parts)` in place of the compiler, and the calls it made."""
    asked = []

    def make_plan(program, topology):
        remat, parts = program.facts["remat"], program.facts["num_parts"]
        asked.append((remat, parts))
        return compile_plan.report(program, topology, fake(fits(remat, parts)))

    monkeypatch.setattr(programs, "hbm_bytes", lambda topology: 16 << 30)
    monkeypatch.setattr(compile_plan, "make_plan", make_plan)
    monkeypatch.setattr(compile_plan, "progress", types.SimpleNamespace(say=lambda text: None))
    case = make_case(**options)
    vary = functools.partial(cases.vary, case, V5E)
    program = cases.make_program(case, V5E)
    return compile_plan.search(program, vary, tuple(REMAT), V5E), asked


def test_the_search_passes_over_what_cannot_fit_and_prefers_less_recomputing(monkeypatch):
    found, asked = search_with(monkeypatch, lambda remat, parts: remat == "full" or parts >= 8)
    # Eight sequences per chip keep 72 GiB of products, and one without remat 18: never compiled.
    assert asked == [("full", 1), ("dots", 8)]
    assert found["fits"] and found["remat"] == "dots" and found["mfu_bound"] > 0.9
    assert [(t["remat"], t["num_parts"]) for t in found["tried"]] == asked
    assert found["batch_size"] == 2048


def test_a_search_in_which_nothing_fits_gives_the_last_plan(monkeypatch):
    found, asked = search_with(monkeypatch, lambda remat, parts: False)
    assert not found["fits"] and asked[-1][1] == 8
