"""Kernels, matmuls and loops are found in optimised HLO, wherever they stand, and counted as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels.aot import hlo
from dsv3_kernels.aot.inventory import Kernel, Loop, Product, take_inventory

# In the shape of what XLA prints: a matmul in a fusion in a fusion, a kernel in a loop, a loop of unknown trips.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,256]{1,0})->f32[256,8]{1,0}}

%nested (p.0: bf16[4,16,32], p.1: f8e4m3fn[4,32,8]) -> f32[4,16,8] {
  %p.0 = bf16[4,16,32]{2,1,0} parameter(0)
  %p.1 = f8e4m3fn[4,32,8]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,16,8]{2,1,0} dot(%p.0, %p.1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/jvp()/while/body/experts/dot_general"}
}

%fused (p.2: bf16[4,16,32], p.3: f8e4m3fn[4,32,8]) -> f32[4,16,8] {
  %p.2 = bf16[4,16,32]{2,1,0} parameter(0)
  %p.3 = f8e4m3fn[4,32,8]{2,1,0} parameter(1)
  ROOT %fusion.1 = f32[4,16,8]{2,1,0} fusion(%p.2, %p.3), kind=kCustom, calls=%nested
}

%body.1 (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.4 = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %fusion.2 = f32[4,16,8]{2,1,0} fusion(%gte.1, %gte.2), kind=kLoop, calls=%fused
  %while.2 = (s32[]) while(%start.2), condition=%condition.1, body=%body.2, metadata={op_name="jit(step)/jvp()/while/body/plan/while"}
  ROOT %inner.1 = (f32[8]{0}, f32[4]{0}) custom-call(%gte.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/jvp()/while/body/experts/jit(_bind)/grouped_matmul/mpmd_map"}, backend_config={module = "while(dot("}
}

%body.2 (p.5: (s32[])) -> (s32[]) {
  ROOT %gemm.1 = (f32[256,8]{1,0}, s8[4]{0}) custom-call(%view.1), custom_call_target="__cublas$lt$matmul"
}

%condition.1 (p.6: (s32[])) -> pred[] {
  ROOT %p.6 = pred[] parameter(0)
}

ENTRY %main.9 (a.1: f32[4,256]) -> f32[256,8] {
  %a.1 = f32[4,256]{1,0} parameter(0)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%start.1), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/jvp()/while"}, backend_config={"known_trip_count":{"n":"27"},"known_init_step":{"init":"0","step":"1"}}
}
"""  # noqa: E501


def test_everything_is_counted_as_often_as_it_runs():
    found = take_inventory(PROGRAM)
    body = "jit(step)/jvp()/while/body"
    assert found.kernels == [Kernel("grouped_matmul", f"{body}/experts/jit(_bind)/grouped_matmul/mpmd_map", 27)]
    flops = 2.0 * 4 * 16 * 8 * 32
    assert found.products == [Product(("bf16", "f8e4m3fn"), "f32", flops, f"{body}/experts/dot_general", 27)]
    assert found.loops == [Loop(27, "jit(step)/jvp()/while", 1), Loop(None, f"{body}/plan/while", 27)]
    assert found.libraries == {"__cublas$lt$matmul": 27}


def test_a_program_of_this_jax_is_read():
    """What XLA prints changes: here both kinds of loops and a matmul of a real program."""

    def function(x, trips):
        with jax.named_scope("waits"):
            x = jax.lax.fori_loop(0, trips, lambda _, x: jnp.sin(x), x)
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.ones((5, 33, 33)))[0]

    compiled = jax.jit(function).lower(jnp.ones((17, 33)), 3).compile()
    found = take_inventory(compiled.as_text())
    assert sorted(loop.trips or 0 for loop in found.loops) == [0, 5]
    assert ["waits" in loop.source for loop in found.loops if loop.trips is None] == [True]
    (product,) = found.products
    assert (product.operands, product.flops, product.runs) == (("f32", "f32"), 2.0 * 17 * 33 * 33, 5)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module with an entry"):
        take_inventory("module @jit_step {}")
    assert hlo.opcode("}") is None
