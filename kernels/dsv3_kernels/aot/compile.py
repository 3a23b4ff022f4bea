"""One case compiled for an H100 that is not here: `python -m dsv3_kernels.aot.compile NAME FOLDER`.

A process of its own, because Mosaic reads its dump folder from the environment, keeps kernels it has compiled, and
aborts the process when its compiler fails. Needs the CUDA plugin of jax and pip's ptxas; no driver.
"""

import importlib.resources
import os
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_kernels.aot.case import AotCase

MEMORY_LIMIT = 4 * 2**30
"""Bytes of data one compilation may allocate."""


def main(name: str, folder: str) -> None:
    """Compiles the case `name`; Mosaic writes PTX, SASS and the report of ptxas into `folder`."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported: registers the plugin, looks for no driver
    from dsv3_kernels.aot import case, selfcheck

    found = [each for each in [*selfcheck.aot_cases(), *case.collect()] if each.name == name]
    if not found:
        raise ValueError(f"case {name!r} is unknown; python -m dsv3_kernels.aot --list names them.")
    compile_case(found[0])


def compile_case(case: "AotCase") -> None:
    """Compiles the function of `case` for sm_90a through a topology that has one H100.

    Raises: whatever lowering or compiling raises, such as ValueError for too much shared memory.
    """
    import jax
    from jax.experimental import topologies

    target = importlib.resources.files("dsv3_kernels.aot").joinpath("h100_sxm.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=device), case.args)
    jax.jit(case.function).lower(*args).compile()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
