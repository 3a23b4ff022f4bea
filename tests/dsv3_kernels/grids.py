"""How many thread blocks the kernels of a lowered program start."""

import re

import jax
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib.mlir import ir


def grids(lowered: jax.stages.Lowered) -> list[tuple[int, int, int]]:
    """The grid of each Mosaic kernel of a program lowered for CUDA, in the order of the text."""
    modules: list[bytes] = []

    def visit(operation: ir.OpView) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            modules.append(operation.attributes["mhlo.backend_config"]["module"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return [_grid(module) for module in modules]


def _grid(module: bytes) -> tuple[int, int, int]:
    """The operands of gpu.launch after its token, before the sizes of blocks, clusters and shared memory: constants."""
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        text = str(ir.Module.parse(module))
    constants = dict(re.findall(r"(%\d+) = \"\S*arith\.constant\"\(\) \{value = (\d+) :", text))
    [operands] = re.findall(r"gpu\.launch\"\(([^)]*)\)", text)
    x, y, z = (int(constants[name]) for name in operands.split(", ")[1:4])
    return x, y, z
