"""The training step of a mesh compiled for devices that are not here: seconds, memory, what devices send each other.

    python -m dsv3_jax.planning.aot configs/dsv3_671b.py --devices 2048
    python -m dsv3_jax.planning.aot configs/dsv3_671b.py --devices 2048 --set precision=mixed

Lowers and compiles the very step that `train.py` runs, from abstract state, for simulated CPU devices; nothing is
allocated. Sizes of what a device holds are read off the program's own arrays and stand beside those of `fit`, which
never sees the program. A CPU multiplies and sends bfloat16 as float32: temporaries are larger than on an accelerator.

Exit status: 0, 1 if XLA had to copy an array to all devices to lay it out anew, 2 for a user error.
"""

import argparse
import contextlib
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import functions_for
from dsv3_jax.parallel.axes import PIPE, ROWS
from dsv3_jax.parallel.mesh import make_mesh, mesh_shape
from dsv3_jax.parallel.pipeline.ticks import Tick, sizes_for
from dsv3_jax.planning.carried import carried
from dsv3_jax.planning.collectives import Collective, by_axes, collectives, narrowed
from dsv3_jax.planning.held import MASTERS, MOMENTS, held
from dsv3_jax.training.batches import batch_specs
from dsv3_jax.training.mesh_step import step_on
from dsv3_jax.training.pipelined import PipelineStep, Placed, micro_batches_of
from dsv3_jax.training.sharded import used_axes
from dsv3_jax.training.state import TrainState, abstract_state, state_shardings
from dsv3_jax.training.step import Rates, Step, denominators_of

REMATERIALIZED = "Involuntary full rematerialization"
"""What XLA's partitioner writes when it finds no way to lay an array out but to give it whole to every device."""
_COMPILED_TO_BE_READ: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Nobody runs the program, so its machine code may be slow; what XLA decides of memory and collectives is the same."""


class Traced(NamedTuple):
    """A step as a program for a mesh, not compiled yet."""

    program: Any
    """With jit's `.lower`."""
    held: dict[str, int]
    """Bytes on a device by class, of the program's own arrays."""


class Compiled(NamedTuple):
    """What is known of a step without running it."""

    held: dict[str, int]
    """As in `Traced`."""
    arguments: int
    temporaries: int
    """Both by XLA's account, for the CPU."""
    exchanged: list[Collective]
    complaints: list[str]
    """Lines that the compiler wrote about arrays it had to copy to all devices."""
    seconds: dict[str, float]
    """To trace and lower, and to compile."""
    cpu_seconds: float


def trace_on(cfg: RunConfig, mesh: Mesh) -> Traced:
    """The step of `cfg` from shapes alone: for all micro-batches of a pipeline, otherwise for one of several."""
    step = step_on(cfg, mesh, functions_for(cfg.precision))
    state = _laid_out(abstract_state(cfg), state_shardings(cfg, mesh))
    traced = _traced(cfg, mesh, step, state)
    own = {MASTERS: _on_device(state.params), MOMENTS: _on_device(state.opt_state)}
    return Traced(traced, own | (carried(traced.jaxpr.jaxpr, cfg.model) if isinstance(step, PipelineStep) else {}))


def compile_on(cfg: RunConfig, mesh: Mesh) -> Compiled:
    """The step of `cfg`, as `trace_on` has it, compiled."""
    start, cpu = time.monotonic(), time.process_time()
    traced = trace_on(cfg, mesh)
    lowered = traced.program.lower()
    middle = time.monotonic()
    with _stderr_of_process() as written:
        compiled = lowered.compile(compiler_options=_COMPILED_TO_BE_READ)
    seconds = {"to trace and lower": middle - start, "to compile": time.monotonic() - middle}
    stats = compiled.memory_analysis()
    return Compiled(
        held=traced.held,
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        exchanged=narrowed(collectives(compiled.as_text(), mesh), traced.program.jaxpr.jaxpr),
        complaints=[line for line in written if REMATERIALIZED in line],
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu,
    )


def report(cfg: RunConfig, mesh: Mesh, compiled: Compiled) -> str:
    """Everything as Markdown."""
    counted = held(cfg, dict(mesh.shape))
    lines = ["| bytes a device | the program | fit |", "|---|---:|---:|"]
    lines += [f"| {name} | {size:,} | {counted.of(name):,} |" for name, size in compiled.held.items()]
    lines += [
        f"| arguments, by XLA | {compiled.arguments:,} | |",
        f"| temporaries, by XLA | {compiled.temporaries:,} | |",
    ]
    lines += ["", "| where | axes | collective | calls | MB a device sends |", "|---|---|---|---:|---:|"]
    for (open_loops, axes, kind), (calls, sent) in by_axes(compiled.exchanged, mesh.shape).items():
        where = f"a trip, {open_loops} deep in loops of run-time bound" if open_loops else "a step"
        lines.append(f"| {where} | {axes} | {kind} | {calls:,} | {sent / 1e6:,.2f} |")
    conditional = sum(one.is_conditional for one in compiled.exchanged)
    lines += [
        "",
        f"{conditional} collectives stand in conditionals.",
        *(compiled.complaints or [f"No {REMATERIALIZED!r}."]),
    ]
    spent = ", ".join(f"{seconds:.0f} s {what}" for what, seconds in compiled.seconds.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return "\n".join([*lines, f"{spent}, {compiled.cpu_seconds:.0f} CPU-seconds; {peak:.2f} GiB resident at most."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, which the top of this file tells."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.aot", description="A training step compiled for a mesh that is not here."
    )
    add_config_arguments(parser)
    parser.add_argument("--devices", type=int, required=True, help="how many to simulate")
    args = parser.parse_args(arguments)
    try:
        check(args.devices > 0, f"--devices {args.devices} must be at least 1.")
        cfg = load_config(args.config, args.set)
        mesh_shape(cfg.parallel, args.devices)  # refuses before any device is made
        jax.config.update("jax_num_cpu_devices", args.devices)
        jax.config.update("jax_enable_compilation_cache", False)  # no such program is ever run
        mesh = make_mesh(cfg.parallel)
        print(f"{cfg.name}, {cfg.precision}: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
        compiled = compile_on(cfg, mesh)
        print(report(cfg, mesh, compiled))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if compiled.complaints else 0


def _traced(cfg: RunConfig, mesh: Mesh, step: Step | PipelineStep, state: TrainState) -> Any:
    """The program that does the work of a step, traced."""
    rates = Rates(*(jax.ShapeDtypeStruct((), np.float32),) * 3)
    counts = micro_batches_of(cfg)
    if isinstance(step, PipelineStep):
        return step.program.trace(state, _placed(cfg, mesh, counts), rates)
    if counts[-1] == 1:
        return step.fused.trace(state, _batches(cfg, mesh, 1), rates)
    one = jax.tree.map(_without_first_axis, _batches(cfg, mesh, 1))
    denominators = jax.eval_shape(denominators_of, _batches(cfg, mesh, counts[-1]))
    given = state, one, denominators, rates
    return step.accumulate.trace(step.zeros.eval_shape(*given), *given)


def _without_first_axis(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _placed(cfg: RunConfig, mesh: Mesh, counts: range) -> Placed:
    """Shapes of what a pipeline takes beside state and rates."""
    sizes = sizes_for(cfg.parallel.schedule, mesh.shape[PIPE], counts)
    whole, by_rank = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, PIPE))
    rows = jax.ShapeDtypeStruct((sizes.ticks, mesh.shape[PIPE], len(Tick._fields)), np.int32, sharding=by_rank)
    bounds, number = (jax.ShapeDtypeStruct(shape, np.int32, sharding=whole) for shape in ((4,), ()))
    shapes: Any = rows, bounds, number
    return Placed(_batches(cfg, mesh, counts[-1]), *shapes)


def _batches(cfg: RunConfig, mesh: Mesh, count: int) -> Batch:
    """Stacked micro-batches, with masks where the run has them."""
    T, depths = cfg.train.seq_len, cfg.model.mtp_depth + 1
    shape, of_labels = (count, cfg.train.batch.micro, T), (count, depths, cfg.train.batch.micro, T)
    tokens, labels = (jax.ShapeDtypeStruct(of, np.int32) for of in (shape, of_labels))
    places = (tokens, tokens) if cfg.data.document_mask else (None, None)
    batches = Batch(tokens, labels, jax.ShapeDtypeStruct(of_labels, np.float32), *places)
    specs = batch_specs(batches, used_axes(mesh, ROWS))
    return _laid_out(batches, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def _laid_out(tree: Any, shardings: Any) -> Any:
    def of(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, tree, shardings)


def _on_device(tree: Any) -> int:
    """Bytes of the arrays' parts that lie on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _stderr_of_process() -> Iterator[list[str]]:
    """Lines that the process, its compiler too, wrote to its standard error meanwhile: there afterwards, and shown."""
    sys.stderr.flush()
    saved, lines = os.dup(2), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")
            sys.stderr.write(text)
            lines += text.splitlines()


if __name__ == "__main__":
    run_program(main)
