"""Every kernel on this GPU against its plain forms, on fresh random inputs: `python -m dsv3_kernels.check`.

    python -m dsv3_kernels.check                           all cases of all ops, at most three minutes
    python -m dsv3_kernels.check fp8_gemm --seed 7         one op, the inputs of an earlier run
    python -m dsv3_kernels.check --form xla --small        what any machine can run

Each case runs on two sets of inputs, twice on each, into buffers filled with NaN: what a kernel leaves unwritten
fails, and so do two runs that differ in a bit (a race). Exit code 1 if a case fails. Without a GPU it says so and
exits 0, unless `--form` names one that needs none.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_kernels.dispatch import why_no_pallas
from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import CheckCase, check_cases

EXIT_FAILED, EXIT_USER_ERROR = 1, 2

# The plain forms are compiled once and run twice: choosing among algorithms would take most of the time.
XLA_FLAGS = "--xla_gpu_autotune_level=0"


class Verdict(NamedTuple):
    """What became of a case; `failures` is empty if all is well, `refused` says why the form does not serve it."""

    case: CheckCase
    errors: dict[str, float]
    failures: tuple[str, ...] = ()
    refused: str = ""

    def line(self) -> str:
        """One line for the terminal."""
        state = "FAILED" if self.failures else "refused" if self.refused else "ok"
        errors = "  ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        return f"{state:8}{self.case.op:26}{self.case.name:44}{'; '.join(self.failures) or self.refused or errors}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, 1 if a case failed, 2 for a user's error)."""
    given = _parse(arguments)
    machine.prepare(XLA_FLAGS)
    try:
        cases = [case for case in check_cases(given.ops) if case.is_small or not given.small]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if given.form == "pallas":
        if machine.gpu() is None:
            print(machine.no_gpu())
            return 0
        if obstacle := why_no_pallas():
            print(f"The kernels cannot run: pallas {obstacle}. --form xla checks the plain forms.")
            return 0
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, form {given.form}, seed {given.seed}")
    started = time.monotonic()
    verdicts = []
    for case in cases:
        if time.monotonic() - started > given.seconds:
            break
        verdicts.append(check(case, given.form, given.seed))
        print(verdicts[-1].line(), flush=True)
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    refused = sum(bool(verdict.refused) for verdict in verdicts)
    print(
        f"{len(verdicts) - failed - refused} passed, {failed} failed, {refused} refused, "
        f"{len(cases) - len(verdicts)} not reached in {time.monotonic() - started:.0f} s"
    )
    return EXIT_FAILED if failed else 0


def check(case: CheckCase, form: str, seed: int) -> Verdict:
    """Runs a case on two fresh sets of inputs and compares."""
    errors: dict[str, float] = {}
    failures: list[str] = []
    make_inputs = jax.jit(case.make_inputs)
    try:
        run = into_poison(lambda inputs: case.run(inputs, form))
        for key in jax.random.split(jax.random.key(seed)):
            inputs = make_inputs(key)
            result, is_poisoned = run(inputs)
            again, _ = run(inputs)
            if not is_poisoned:
                failures.append("the result did not go into the buffer filled with NaN")
            if not all(jax.tree.leaves(jax.tree.map(_same_bits, result, again))):
                failures.append("two runs differ")
            for comparison in case.comparisons:
                error = float(jax.jit(comparison.error)(result, comparison.expected(inputs)))
                errors[comparison.name] = float(np.fmax(error, errors.get(comparison.name, 0.0)))
                if not (error < comparison.limit or error == comparison.limit == 0):
                    failures.append(f"{comparison.name} {error:.3g}, limit {comparison.limit:g}")
    except NotImplementedError as error:
        return Verdict(case, {}, refused=str(error))
    except jax.errors.JaxRuntimeError as error:
        failures.append(str(error).splitlines()[0])
    return Verdict(case, errors, tuple(dict.fromkeys(failures)))


def into_poison(function: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, bool]]:
    """`function` with its result written over donated buffers of NaN; also whether it was (by their addresses).

    Memory of the size of its temporaries was filled with NaN and given back just before. All inputs have the shapes of
    the first.
    """
    jitted = jax.jit(lambda inputs, poison: function(inputs), donate_argnums=1, keep_unused=True)
    compiled: list[jax.stages.Compiled] = []

    def run(inputs: Any) -> tuple[Any, bool]:
        poison = jax.tree.map(_poison, jax.eval_shape(function, inputs))
        before = _addresses(poison)
        if not compiled:
            compiled.append(jitted.lower(inputs, poison).compile())
        sizes = compiled[0].memory_analysis()
        if sizes and sizes.temp_size_in_bytes:
            jnp.full(-(-sizes.temp_size_in_bytes // 4), jnp.nan, jnp.float32).block_until_ready().delete()
        result = compiled[0](inputs, poison)
        return result, _addresses(result) == before

    return run


def _poison(like: jax.ShapeDtypeStruct) -> jax.Array:
    worst = jnp.nan if jnp.issubdtype(like.dtype, jnp.floating) else jnp.iinfo(like.dtype).max
    return jnp.full(like.shape, worst, like.dtype)


def _addresses(arrays: Any) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(arrays) if array.size]


@jax.jit
def _same_bits(x: jax.Array, y: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return (jax.lax.bitcast_convert_type(x, bits) == jax.lax.bitcast_convert_type(y, bits)).all()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument("--form", default="pallas", choices=("pallas", "xla", "reference"), help="default %(default)s")
    parser.add_argument("--small", action="store_true", help="only cases that a CPU can afford")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; fresh by default")
    parser.add_argument(
        "--seconds", type=float, default=200, help="start no case after this time (default %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
