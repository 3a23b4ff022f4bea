"""Launches are counted in optimised HLO."""

import pytest

from dsv3_kernels.aot import hlo

# In the shape of what XLA prints: types that are tuples, a loop, a branch, a computation that is called twice.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,256]{1,0})->f32[256,8]{1,0}}

%fused_pad (param_0: f32[4,256]) -> f32[256,8] {
  %param_0 = f32[4,256]{1,0} parameter(0)
  %transpose.1 = f32[256,4]{1,0} transpose(%param_0), dimensions={1,0}
  ROOT %pad.0 = f32[256,8]{1,0} pad(%transpose.1, %constant_3), padding=0_0x0_4
}

%body.1 (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %gte.1 = f32[8]{0} get-tuple-element(%p.1), index=1
  %inner.1 = f32[8]{0} custom-call(%gte.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="decode"}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%gte.0, %inner.1)
}

%condition.1 (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %compare.1 = pred[] fusion(%p.2), kind=kLoop, calls=%fused_pad
}

%left.1 (p.3: f32[8]) -> f32[8] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p.3)
}

%right.1 (p.4: f32[8]) -> f32[8] {
  ROOT %p.4 = f32[8]{0} parameter(0)
}

%called.1 (p.5: f32[8]) -> f32[8] {
  %p.5 = f32[8]{0} parameter(0)
  ROOT %kernel.2 = (f32[8]{0}, u8[16]{0}) custom-call(%p.5), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main.9 (a.1: f32[4,256]) -> f32[256,8] {
  %a.1 = f32[4,256]{1,0} parameter(0), sharding={mesh[], [{}, {}]}
  %pad_fusion = f32[256,8]{1,0} fusion(%a.1), kind=kLoop, calls=%fused_pad
  %view.1 = f32[2048]{0} bitcast(%pad_fusion)
  %beside.1 = ((f32[2048]{0}), f32[8]{0}, u32[]) fusion-start(%view.1), kind=kLoop, calls=%fused_pad
  %beside.2 = f32[8]{0} fusion-done(%beside.1)
  %while.1 = (s32[], f32[8]{0}) while(%start.1), condition=%condition.1, body=%body.1
  %branch.1 = f32[8]{0} conditional(%which.1, %a.1, %a.1), branch_computations={%left.1, %right.1}
  %call.1 = f32[8]{0} call(%view.1), to_apply=%called.1
  %call.2 = f32[8]{0} call(%call.1), to_apply=%called.1
  ROOT %gemm.1 = (f32[256,8]{1,0}, s8[4]{0}) custom-call(%view.1), custom_call_target="__cublas$lt$matmul"
}
"""


def test_loops_branches_and_calls_are_entered_but_not_fusions():
    assert hlo.launches(PROGRAM) == {hlo.KERNEL: 3, "fusion": 3, "copy": 1, "custom-call": 1}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module with an entry"):
        hlo.launches("module @jit_step {}")
