"""The layer of experts that is compiled as a whole."""

import jax

from dsv3_kernels.aot import program_moe_layer

KERNEL = '  %k.{} = bf16[128,128]{{1,0}} custom-call(%a), custom_call_target="mosaic_gpu_v2"\n'
PRODUCT = "  %dot.4 = f32[4,128,4096]{2,1,0} dot(%a, %b), lhs_contracting_dims={1}\n"
LIBRARY = '  %gemm.1 = (bf16[128,128]{1,0}, s8[4]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul$f8"\n'


def program(lines: str) -> str:
    return "HloModule jit_layer\n\nENTRY %main.1 (a.1: bf16[128,128]) -> bf16[128,128] {\n" + lines + "}\n"


def test_gradients_are_shaped_as_what_they_are_of():
    (layer,) = program_moe_layer.aot_cases()
    shapes = jax.eval_shape(layer.function, *layer.args)
    rows, d_out, gate_up, down = layer.args
    assert [each.shape for each in shapes] == [d_out.shape, rows.shape, gate_up.shape, down.shape]


def test_a_layer_without_its_kernels_is_refused():
    kernels = "".join(map(KERNEL.format, range(program_moe_layer.NUM_KERNELS)))
    assert program_moe_layer.find_faults(program(kernels)) == []
    assert "has 1 kernels instead of 16" in program_moe_layer.find_faults(program(KERNEL.format(0)))[0]
    for line in (PRODUCT, LIBRARY):
        (fault,) = program_moe_layer.find_faults(program(kernels + line))
        assert fault.startswith("multiplies outside its kernels")
