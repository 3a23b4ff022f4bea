"""A whole training step compiled for an H100 that is not here: its kernels, its loops, the memory it needs.

    make aot-step CONFIG=configs/v2_lite_16b.py ARGS="--rows 2 --precision fp8_dsv3"
    make aot-step CONFIG=configs/dsv3_671b.py ARGS="--layers 1 --set model.mtp_depth=0 train.remat=paper"

Forward, backward and AdamW on one micro-batch, the program that `train.py` runs there; compiled, never run, and
nothing is allocated. `make` gives it an environment with CUDA's compilers; in one of your own:
`python -m dsv3_jax.planning.aot_step CONFIG`. Layers of a kind are one body in a scan: more of them compile no longer.

Exit status: 0, 1 if a loop's trips depend on data (the device would wait for the host before each), 2 for a user error.
"""

import argparse
import collections
import contextlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.interrupt import run_program
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import Rates, make_step
from dsv3_kernels import dispatch
from dsv3_kernels.aot.compile import on_h100
from dsv3_kernels.aot.inventory import Inventory, Loop, take_inventory

GPU = "H100 SXM"
GPU_BYTES = 80 * 2**30
_ROOM = 2**43
"""Bytes of memory that XLA is told of: what does not fit it would recompute, and the kernels would be miscounted."""
_PLUMBING = re.compile(
    r"while|body|cond|branch_\d+_fun|eval_jaxpr|closed_call|checkpoint|rematted_computation|jit\(.*|.*->.*|"
)
"""Elements of an operation's name that tell how jax came to it, not where it stands in the model."""


class Memory(NamedTuple):
    """Bytes on the device."""

    parameters: int
    moments: int
    arguments: int
    """These two, and the batch."""
    outputs: int
    """Beside the arguments: the new state takes the place of the old."""
    temporaries: int

    @property
    def peak(self) -> int:
        """All at once."""
        return self.arguments + self.outputs + self.temporaries


class CompiledStep(NamedTuple):
    """What is known of a step without running it."""

    inventory: Inventory
    memory: Memory
    in_xla: list[str]
    """Calls of ops that could have been kernels, with why they are not."""
    seconds: float
    """To trace, lower and compile."""


def compile_step(cfg: RunConfig) -> CompiledStep:
    """Compiles the step of `cfg` on one micro-batch.

    Raises:
        UserError: this environment cannot compile for CUDA.
    """
    state = abstract_state(cfg)
    arguments = _on_h100((state, *_batch_and_rates(cfg)))
    with _refusals() as in_xla:
        start = time.monotonic()
        compiled = make_step(cfg).fused.lower(*arguments).compile()
        seconds = time.monotonic() - start
    memory = _memory(state, compiled.memory_analysis())
    return CompiledStep(take_inventory(compiled.as_text()), memory, in_xla, seconds)


def data_dependent(loops: Sequence[Loop]) -> list[Loop]:
    """Those for which the host must wait."""
    return [loop for loop in loops if loop.trips is None]


def report(step: CompiledStep) -> str:
    """Everything as Markdown."""
    return "\n\n".join([_kernels(step), _products(step), _loops(step.inventory.loops), _needs(step.memory)])


def as_data(step: CompiledStep) -> dict[str, Any]:
    """The same, as `--json` prints it."""
    inventory = step.inventory
    return {
        "kernels": [kernel._asdict() for kernel in inventory.kernels],
        "products": [product._asdict() for product in inventory.products],
        "libraries": dict(inventory.libraries),
        "loops": [loop._asdict() for loop in inventory.loops],
        "in_xla": step.in_xla,
        "memory": {**step.memory._asdict(), "peak": step.memory.peak},
        "gpus_memory": gpus_needed(step.memory),
        "seconds": step.seconds,
    }


def gpus_needed(memory: Memory) -> int:
    """How many GPUs have that much memory together."""
    return math.ceil(memory.peak / GPU_BYTES)


def where(source: str) -> str:
    """An operation's name without what tells only how jax came to it: "attention, backward"."""
    scopes = re.sub(r"(?:transpose\(|jvp\()+(.*?)\)+", r"\1", source.rpartition("/")[0]).split("/")
    named = [scope for scope in scopes if not _PLUMBING.fullmatch(scope)]
    return ("/".join(named) or "step") + (", backward" if "transpose(" in source else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, which the top of this file tells."""
    given = _parse(arguments)
    try:
        cfg = _config(given)
        step = compile_step(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = cfg.train.batch.micro
    if given.json:
        about = {"config": cfg.name, "precision": cfg.precision, "layers": cfg.model.num_layers, "rows": rows}
        print(json.dumps({**about, "seq_len": cfg.train.seq_len, "target": given.target, **as_data(step)}))
    else:
        what = (
            f"{cfg.name}, {cfg.model.num_layers} layers, {cfg.precision}: a step of {rows} x {cfg.train.seq_len} tokens"
        )
        print(f"{what}, compiled for one {GPU} in {step.seconds:.0f} s, never run\n\n{report(step)}")
    return 1 if data_dependent(step.inventory.loops) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.aot_step", description="A training step compiled for a GPU that is not here."
    )
    add_config_arguments(parser)
    parser.add_argument("--target", choices=["h100"], default="h100", help="the GPU (default %(default)s)")
    parser.add_argument("--precision", help="in place of the configuration's")
    parser.add_argument("--layers", type=int, help="so many layers, of them one of experts at least")
    parser.add_argument("--rows", type=int, default=1, help="sequences of the micro-batch (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def _config(given: argparse.Namespace) -> RunConfig:
    """The configuration on one device, with what the other options change of it."""
    check(given.rows > 0, f"--rows {given.rows} must be at least 1.")
    check(given.layers is None or given.layers > 0, f"--layers {given.layers} must be at least 1.")
    model = load_config(given.config, given.set).model
    changes = [f"train.batch.{key}={given.rows}" for key in ("micro", "start", "full")]
    changes += [f"parallel.{axis}=1" for axis in ("pipe", "data", "expert", "expert_nodes", "tensor")]
    if given.precision:
        changes.append(f"precision={given.precision}")
    if given.layers:
        num_dense = min(model.num_dense_layers, given.layers - 1)
        changes += [f"model.num_layers={given.layers}", f"model.num_dense_layers={num_dense}"]
    return load_config(given.config, [*given.set, *changes])


def _batch_and_rates(cfg: RunConfig) -> tuple[Batch, Rates]:
    """Shapes of what a step takes beside the state."""
    B, T, depths = cfg.train.batch.micro, cfg.train.seq_len, cfg.model.mtp_depth + 1
    labels, weights = (jax.ShapeDtypeStruct((1, depths, B, T), dtype) for dtype in (np.int32, np.float32))
    rate = jax.ShapeDtypeStruct((), np.float32)
    return Batch(jax.ShapeDtypeStruct((1, B, T), np.int32), labels, weights), Rates(rate, rate, rate)


def _on_h100(arguments: Any) -> Any:
    jax.config.update("jax_enable_compilation_cache", False)  # a program for no device cannot be loaded from it
    try:
        return on_h100(arguments, memory_bytes=_ROOM)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"this environment cannot compile for CUDA ({error}); run it by `make aot-step`.") from error


@contextlib.contextmanager
def _refusals() -> Iterator[list[str]]:
    """What the kernels' logger says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    dispatch.LOGGER.addHandler(handler)
    try:
        yield said
    finally:
        dispatch.LOGGER.removeHandler(handler)


def _memory(state: TrainState, stats: Any) -> Memory:
    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return Memory(
        parameters=size(state.params),
        moments=size(state.opt_state),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def _kernels(step: CompiledStep) -> str:
    calls: dict[str, list[int]] = collections.defaultdict(list)
    for kernel in step.inventory.kernels:
        calls[kernel.name].append(kernel.runs)
    rows = [f"| {name} | {len(runs)} | {sum(runs)} |" for name, runs in sorted(calls.items())]
    lines = ["| kernel | calls in the program | in a step |", "|---|---:|---:|", *(rows or ["| none | 0 | 0 |"])]
    return "\n".join(lines) + "".join(f"\n\n{line}" for line in step.in_xla)


def _products(step: CompiledStep) -> str:
    """By place and dtypes; the largest first."""
    flops: collections.Counter[tuple[str, str]] = collections.Counter()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for product in step.inventory.products:
        key = (where(product.source), f"{' x '.join(product.operands)} to {product.result}")
        flops[key] += round(product.flops * product.runs)
        counts[key] += 1
    lines = ["| multiplied outside kernels | dtypes | in the program | TFLOP in a step |", "|---|---|---:|---:|"]
    for (place, dtypes), total in flops.most_common():
        lines.append(f"| {place} | {dtypes} | {counts[place, dtypes]} | {total / 1e12:.3f} |")
    lines += [f"| {name} | | | called {count} times |" for name, count in step.inventory.libraries.items()]
    return "\n".join(lines)


def _loops(loops: Sequence[Loop]) -> str:
    counted = collections.Counter((where(f"{loop.source}/"), loop.trips) for loop in loops)
    lines = ["| loop | trips | in the program |", "|---|---:|---:|"]
    for (place, trips), count in counted.items():
        lines.append(f"| {place} | {'depend on data' if trips is None else trips} | {count} |")
    return "\n".join(lines)


def _needs(memory: Memory) -> str:
    def gib(size: int) -> str:
        return f"{size / 2**30:.1f}"

    needed = gpus_needed(memory)
    verdict = f"fits into the {GPU_BYTES / 2**30:.0f} GiB of one" if needed == 1 else f"needs {needed} GPUs' memory"
    return (
        f"Memory in GiB: {gib(memory.peak)} = arguments {gib(memory.arguments)} (parameters {gib(memory.parameters)}, "
        f"moments {gib(memory.moments)}) + outputs not in their place {gib(memory.outputs)} + temporaries "
        f"{gib(memory.temporaries)}, gradients included: {verdict}."
    )


if __name__ == "__main__":
    run_program(main)
