"""Cases compiled for an H100 that is not here: `python -m dsv3_kernels.aot.compile`, asked line by line.

A question is a line of JSON {"case": name, "folder": where its reports go}, an answer one of {"error": text or null}.
What is printed meanwhile goes into the folder too.
It is a process of its own, because Mosaic reads its dump folder from the environment and aborts the process when its
compiler fails. Needs the CUDA plugin of jax and pip's ptxas; no driver.
"""

import importlib.resources
import json
import os
import re
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_kernels.aot import hlo

if TYPE_CHECKING:
    import jax

    from dsv3_kernels.aot.case import AotCase

MEMORY = "program.memory"
"""The file of the memory that it needs, in words."""

LOG = "program.log"
"""The file of what compilers print, of use when they end the process."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes of data that this process may allocate."""


def main() -> None:
    """Answers each line of standard input until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported: registers the plugin, looks for no driver
    import jax

    from dsv3_kernels.aot import case, selfcheck

    jax.config.update("jax_enable_compilation_cache", False)  # a program for no device cannot be loaded from it
    cases = {each.name: each for each in [*selfcheck.aot_cases(), *case.collect()]}
    for line in sys.stdin:
        question = json.loads(line)
        error = None
        try:
            write_reports(cases[question["case"]], Path(question["folder"]))
        except Exception:  # noqa: BLE001  whatever lowering or compiling raises is this case's fault; the next goes on
            error = traceback.format_exc()
        jax.clear_caches()
        print(json.dumps({"error": error}), file=answers, flush=True)


def write_reports(case: "AotCase", folder: Path) -> None:
    """Compiles a case into `folder`.

    Mosaic writes PTX, SASS and the report of ptxas there; XLA's optimised program and the memory it needs come beside.
    Raises: as `compile_case`.
    """
    with (folder / LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    compiled = compile_case(case)
    (folder / hlo.FILE).write_text(compiled.as_text() or "", encoding="utf-8")
    (folder / MEMORY).write_text(describe_memory(compiled), encoding="utf-8")


def compile_case(case: "AotCase") -> "jax.stages.Compiled":
    """The function of `case` compiled for sm_90a.

    Raises: whatever lowering or compiling raises, such as ValueError for too much shared memory.
    """
    import jax

    return jax.jit(case.function).lower(*on_h100(case.args)).compile()


def on_h100(arguments: Any, *, memory_bytes: int | None = None) -> Any:
    """The shapes and dtypes of a tree of arguments, on an H100 that is not here: `jit(f).lower` compiles for it.

    Args:
        arguments: arrays, or what has their shapes and dtypes.
        memory_bytes: in place of its 80 GiB. What does not fit is recomputed where XLA finds a way.
    Raises: RuntimeError where jax has no plugin for CUDA.
    """
    import jax
    from jax.experimental import topologies

    target = importlib.resources.files("dsv3_kernels.aot").joinpath("h100_sxm.txtpb").read_text(encoding="utf-8")
    if memory_bytes is not None:
        target = re.sub(r"(?<=device_memory_size: )\d+", str(memory_bytes), target)
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=device), arguments)


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
    main()
