"""One case compiled for an H100 that is not here: `python -m dsv3_kernels.aot.compile NAME FOLDER`.

A process of its own, because Mosaic reads its dump folder from the environment, keeps kernels it has compiled, and
aborts the process when its compiler fails. Needs the CUDA plugin of jax and pip's ptxas; no driver.
"""

import importlib.resources
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from dsv3_kernels.aot.case import AotCase

HLO = "program.hlo"
"""The file of XLA's optimised program."""
MEMORY = "program.memory"
"""The file of the memory that it needs, in words."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes of data one compilation may allocate."""


def main(name: str, folder: str) -> None:
    """Compiles the case `name` into `folder`.

    Mosaic writes PTX, SASS and the report of ptxas there; XLA's optimised program and the memory it needs come beside.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported: registers the plugin, looks for no driver
    from dsv3_kernels.aot import case, selfcheck

    found = [each for each in [*selfcheck.aot_cases(), *case.collect()] if each.name == name]
    if not found:
        raise ValueError(f"case {name!r} is unknown; python -m dsv3_kernels.aot --list names them.")
    compiled = compile_case(found[0])
    (Path(folder) / HLO).write_text(compiled.as_text() or "", encoding="utf-8")
    (Path(folder) / MEMORY).write_text(describe_memory(compiled), encoding="utf-8")


def compile_case(case: "AotCase") -> "jax.stages.Compiled":
    """The function of `case` compiled for sm_90a through a topology that has one H100.

    Raises: whatever lowering or compiling raises, such as ValueError for too much shared memory.
    """
    import jax
    from jax.experimental import topologies

    target = importlib.resources.files("dsv3_kernels.aot").joinpath("h100_sxm.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=device), case.args)
    return jax.jit(case.function).lower(*args).compile()


def describe_memory(compiled: "jax.stages.Compiled") -> str:
    """What a program holds on the device while it runs, such as "arguments 12.0, outputs 4.0, temporaries 0.5 MiB"."""
    stats = compiled.memory_analysis()
    assert stats is not None  # XLA for GPUs always has it
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    return ", ".join(f"{what} {size / 2**20:.1f}" for what, size in sizes.items()) + " MiB"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
