"""What a program is compiled for: the GPU of this process, or an H100 where there is none.

A program may be lowered for CUDA on a machine without a GPU (`jax.export`, a compile-only topology). Then it is taken
to be meant for an H100 SXM. Where the process has a GPU, that one decides.
"""

import re
from typing import Any

import jax

OLDEST_PALLAS_JAX = (0, 11, 2)
H100_SMS = 132
"""Of an H100 or H200 SXM."""
MISCOMPILED_CUDA = (12080, 12090)
"""From CUDA 12.8.0 to 12.9.0 ptxas miscompiles causal masks; jax's own attention for Hopper refuses them, too."""


def gpu() -> Any | None:
    """The first NVIDIA GPU of this process, also where jax prefers its CPU; None without one."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:  # jax has no such backend here
        return None


def num_sms(given: int | None = None) -> int:
    """Thread blocks that run at once: `given`, or all multiprocessors of the target."""
    if given is not None:
        return given
    device = gpu()
    return device.core_count if device is not None else H100_SMS


def why_no_kernels(*, has_causal_mask: bool = False) -> str | None:
    """Why the Hopper kernels cannot be compiled for CUDA by this process, or None if they can.

    Args:
        has_causal_mask: whether the kernel has one, which some versions of CUDA miscompile.
    """
    if jax.__version_info__ < OLDEST_PALLAS_JAX:
        return f"needs jax {'.'.join(map(str, OLDEST_PALLAS_JAX))} or newer, this is {jax.__version__}"
    device = gpu()
    if device is None:
        return None
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), {device.device_kind} has {capability}"
    version = cuda_version(device)
    if has_causal_mask and version is not None and MISCOMPILED_CUDA[0] <= version <= MISCOMPILED_CUDA[1]:
        return (
            f"needs CUDA 12.9.1 or newer, or older than 12.8: ptxas of {version // 1000}.{version % 1000 / 10:g} "
            "miscompiles causal masks"
        )
    return None


def cuda_version(device: Any) -> int | None:
    """CUDA's version as the runtime gives it, such as 12090 for 12.9; None where the client does not report it."""
    found = re.search(r"cuda\s+(\d+)", getattr(device.client, "platform_version", ""), re.IGNORECASE)
    return int(found[1]) if found else None
