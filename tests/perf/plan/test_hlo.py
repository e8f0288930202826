"""Collectives read from a program's text: kinds, groups, bytes in a ring, trips of the loops around them."""

import pytest

from rag_mm.perf.plan import hlo

TEXT = """HloModule jit_step

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %r = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %rs = f32[4,8]{1,0:T(8,128)} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  %fusion = bf16[16,8] fusion(%z), kind=kLoop, calls=%fused.1
}

%fused.1 (q: f32[8]) -> f32[8] {
  %cp = f32[8] collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}

%condition.1 (p: (s32[], bf16[16,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(32), metadata={op_name="lt"}
  ROOT %lt = pred[] compare(%i, %constant.9), direction=LT
}

%unreached.1 (q: f32[8]) -> f32[8] {
  %never = f32[8] all-reduce(%q), replica_groups={{0,1}}, to_apply=%add.1
}

ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], bf16[16,8]) while(%t), condition=%condition.1, body=%body.1
  %ar = (f32[8]{0}, f32[2]{0}) all-reduce(%u, %v), replica_groups=mesh['x'=2,'y'=8] {'x','y'}, to_apply=%add.1
  %ags = (f32[2,4], f32[8,4]) all-gather-start(%w), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = f32[8,4] all-gather-done(%ags)
}
"""


def test_every_collective_is_found_with_what_it_moves():
    found = {(c.kind, c.group_size, c.sent_bytes, c.times) for c in hlo.read_collectives(TEXT)}
    assert found == {
        ("all-gather", 4, 64 * 8 * 2 * 3 / 4, 32),
        ("reduce-scatter", 4, 4 * 8 * 4 * 3, 32),
        ("collective-permute", 2, 8 * 4, 32),
        ("all-reduce", 16, 2 * (8 + 2) * 4 * 15 / 16, 1),
        ("all-gather", 4, 8 * 4 * 4 * 3 / 4, 1),
    }


def test_instructions_are_counted_by_kind():
    counted = hlo.count(hlo.read_collectives(TEXT))
    assert counted == {
        "all-gather": 2,
        "all-reduce": 1,
        "reduce-scatter": 1,
        "all-to-all": 0,
        "collective-permute": 1,
    }


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read_collectives("nothing")
