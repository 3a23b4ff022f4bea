"""The launch of a kernel for Hopper: what every call of `plgpu.kernel` has to remember.

Kernels are written for Mosaic's lane semantics, which jax 0.11.2 to 0.12 share. Inside `jax.shard_map` the results of a
kernel vary over the mesh axes that its arguments vary over, which `plgpu.kernel` does not state. How many thread blocks
run at once is `num_sms`; which targets are refused is `target.why_no_kernels`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import target
from dsv3_kernels.varying import varying_as

num_sms = target.num_sms


def kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    has_own_barriers: bool = False,
    approx_math: bool = False,
    interpret: Any = None,
    **sizes: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` as a function of arrays and references.

    Args:
        has_own_barriers: whether the body orders all accesses to shared memory itself, so that the compiler adds no
            barrier around them.
        approx_math: whether exponentials and divisions may be the hardware's approximations.
        interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
        sizes: grid, cluster, threads and scratch memory, as `plgpu.kernel` takes them.
    """
    launched = plgpu.kernel(
        body,
        out_type=out_type,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=has_own_barriers,
            approx_math=approx_math,
        ),
        interpret=interpret,
        **sizes,
    )

    def launch(*operands: Any) -> Any:
        arrays = [x for x in operands if isinstance(jax.typeof(x), ShapedArray)]
        return varying_as(launched(*operands), arrays)

    return launch
