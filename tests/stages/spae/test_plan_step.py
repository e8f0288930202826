"""Plans of image tokenizers without the TPU compiler: the page's values, the lowered step, mistakes."""

import dataclasses
import json

import pytest

from rag_mm.cli import main
from rag_mm.core import sharding
from rag_mm.perf import chips
from rag_mm.perf.plan import compile_plan, programs, traffic
from rag_mm.stages import chain_config
from rag_mm.stages.spae import plan_step

V5E = chips.parse_topology("v5e:4x4")
FOUR = chips.parse_topology("v5e:2x2")
SMALL = {
    "world.image_size": 16,
    "spae.model": {
        "image_size": 16,
        "encoder": "conv_shortcut",
        "width": 4,
        "width_multipliers": (1, 2),
        "num_res_blocks": 1,
        "embed_dim": 8,
        "codebook_size": 16,
        "levels": (2, 8),
    },
    "spae.batch_size": 8,
}
ADVERSARIAL = {
    "spae.losses.weights": {"adversarial": 0.1, "r1": 1.0, "lecam": 0.1},
    "spae.losses.discriminator": {"width": 4, "width_multipliers": (1,)},
    "spae.restart.every": 10,
}


def make_case(name="configs/spae.py:base", topology=V5E, overrides=None, **options):
    return plan_step.make_case(chain_config.load(name, overrides or {}), topology, **options)


def test_the_page_decides_what_the_command_does_not():
    facts = plan_step.make_program(make_case(), V5E).facts
    assert facts["batch_size"] == 256 and facts["codes_per_image"] == 597
    assert (facts["remat"], facts["num_parts"], facts["dtype"]) == ("none", 1, "bfloat16")
    case = make_case("configs/spae.py:vqgan", batch_size=64, num_parts=2, remat="full")
    program = plan_step.make_program(case, V5E)
    assert program.mesh_shape == (16, 1, 1) and program.facts["codes_per_image"] == 1024
    assert (program.facts["remat"], program.facts["num_parts"]) == ("full", 2)
    assert plan_step.vary(case, V5E, "none", 4).facts["num_parts"] == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch=100"], "does not split over data x fsdp x parts = 16"),
        (["--remat=dots"], "give one of none, full"),
        (["--mesh=1,4,4"], "give 1 along tensor"),
        (["--decode"], "--decode is for decoders"),
        (["--encode", "--search"], "leave out --decode and --encode"),
        (["--config.spae.losses.weights.perceptual=0.1"], "--config.spae.losses.folder"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_compiled(capsys, monkeypatch, words, says):
    monkeypatch.setattr(programs, "make_mesh", lambda *_: pytest.fail("compiled"))
    words = ["plan", "--config=configs/spae.py:base", "--topology=v5e:4x4", *words]
    assert main.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def fake(flops=None, moved_bytes=None):
    fits = flops is not None
    return programs.Compiled(fits, 1 << 30, 16 << 30, 10, 20, 10, flops, moved_bytes)


def test_costs_are_the_compilers_and_unknown_without_them():
    case = make_case()
    program = plan_step.make_program(case, V5E)
    found = compile_plan.report(program, V5E, fake(197e12, 819e9 / 2))
    assert found["seconds"]["compute"] == pytest.approx(1) == found["step_seconds"]
    assert found["seconds"]["hbm"] == pytest.approx(0.5)
    assert found["flops_per_image"] == pytest.approx(16 * 197e12 / 256)
    assert found["images_per_second"] == pytest.approx(256)
    assert found["mfu_bound"] == pytest.approx(1)
    again = plan_step.vary(case, V5E, "full", 1)
    assert compile_plan.report(again, V5E, fake(197e12, 0))["mfu_bound"] == pytest.approx(0.75)
    found = compile_plan.report(program, V5E, fake())
    assert not found["fits"] and "step_seconds" not in found
    json.dumps(found, allow_nan=False)


def test_slices_pay_for_their_gradients_over_the_network():
    two = chips.parse_topology("v5e:2x2", 2)
    case = make_case("configs/spae.py:vqgan", two, SMALL)
    program = plan_step.make_program(case, two)
    costs = program.costs(fake(1.0, 1.0))
    share = traffic.gradient_bytes(program.facts["num_params"], (8, 1, 1), 2)
    assert costs.dcn_bytes == share == 4 * program.facts["num_params"]


@pytest.mark.parametrize("mesh", [None, (2, 2, 1)])
def test_the_whole_training_step_is_lowered(mesh):
    """With all losses and the restart, whose state comes out again with the parameters."""
    case = make_case("configs/spae.py:vqgan", FOUR, SMALL | ADVERSARIAL, mesh=mesh)
    program = plan_step.make_program(case, FOUR)
    lowered = program.lower(sharding.make_mesh(*program.mesh_shape))
    (state, batch), held = lowered.args_info
    assert set(batch) == {"images"} and not held
    params = state.params
    assert {"encoder", "discriminator", "logit_averages", "codebook"} <= set(params)
    after, metrics = lowered.out_info
    assert after.params["codebook"].shape == params["codebook"].shape == (16, 8)
    assert after.opt_state.end.shape == (16,)
    assert {"loss", "discriminator/r1", "discriminator/lecam", "restarted_codes"} <= set(metrics)


def test_words_are_held_and_encoding_reads_neither_losses_nor_optimizer():
    overrides = SMALL | {"spae.model": SMALL["spae.model"] | {"codebook": "language"}}
    case = make_case(overrides=overrides, topology=FOUR)
    mesh = sharding.make_mesh(4)
    (state, _), held = plan_step.make_program(case, FOUR).lower(mesh).args_info
    assert "codebook" not in state.params and held["held"]["codebook"].shape == (16, 8)
    encoding = dataclasses.replace(case, is_encoding=True)
    lowered = plan_step.make_program(encoding, FOUR).lower(mesh)
    assert lowered.out_info.shape == (8, 2 * 2 + 8 * 8)
    assert set(lowered.args_info[0][0]) >= {"encoder", "codebook"}
