"""One case run on this process's device, twice on each of two sets of inputs, and judged."""

import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_kernels.dispatch import why_no_pallas
from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import CheckCase

# The plain forms are compiled once and run twice: choosing among algorithms would take most of the time.
XLA_FLAGS = "--xla_gpu_autotune_level=0"

PASSED, FAILED, REFUSED, HUNG, CRASHED = VERDICTS = ("passed", "failed", "refused", "hung", "crashed")


class Verdict(NamedTuple):
    """What became of a case."""

    op: str
    name: str
    verdict: str
    """One of VERDICTS. Hung and crashed are verdicts on a process (`gpu/isolate.py`), crashed also on the device."""
    path: str = ""
    """What the case is the first of its kind to run, as `CheckCase.path`."""
    errors: Mapping[str, float] = MappingProxyType({})
    """The largest error of each comparison."""
    reasons: tuple[str, ...] = ()
    """Why it is not passed, one line each."""
    stderr: str = ""
    """The end of what its process wrote, where that ended with it."""
    seconds: float = 0.0

    def as_data(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return self._asdict() | {"errors": errors, "reasons": list(self.reasons), "seconds": round(self.seconds, 2)}

    def line(self) -> str:
        """One line for the terminal."""
        state = "ok" if self.verdict == PASSED else self.verdict.upper()
        errors = "  ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        path = f"[{self.path}] " if self.path else ""
        return f"{state:8}{self.op:26}{self.name:44}{path}{'; '.join(self.reasons) or errors}"


def from_data(data: Mapping[str, Any]) -> Verdict:
    """The inverse of `Verdict.as_data`; other entries do not matter."""
    known = {name: data[name] for name in Verdict._fields}
    errors = {name: math.nan if error is None else error for name, error in data["errors"].items()}
    return Verdict(**known | {"errors": errors, "reasons": tuple(data["reasons"])})


def obstacle(implementation: str) -> str:
    """Why this process can check nothing of an implementation, "" if it can."""
    if implementation != "pallas":
        return ""
    if machine.gpu() is None:
        return machine.no_gpu()
    why = why_no_pallas()
    return f"The kernels cannot run: pallas {why}. --implementation xla checks the plain ones." if why else ""


def check(case: CheckCase, implementation: str, seed: int) -> Verdict:
    """Runs a case on two fresh sets of inputs and compares."""
    started = time.monotonic()
    errors: dict[str, float] = {}
    failures: list[str] = []

    def verdict(word: str, *reasons: str) -> Verdict:
        return Verdict(case.op, case.name, word, case.path, errors, reasons, seconds=time.monotonic() - started)

    try:
        make_inputs = jax.jit(case.make_inputs)
        run = into_poison(lambda inputs: case.run(inputs, implementation))
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
                errors[comparison.name] = float(np.maximum(error, errors.get(comparison.name, 0.0)))
                if not (error < comparison.limit or error == comparison.limit == 0):
                    failures.append(f"{comparison.name} {error:.3g}, limit {comparison.limit:g}")
    except NotImplementedError as error:
        return verdict(REFUSED, str(error))
    except jax.errors.JaxRuntimeError as error:  # after an error of CUDA nothing runs in this process any more
        return verdict(CRASHED, *failures, str(error).splitlines()[0])
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a case raises must cost no other, nor exit with 0
        return verdict(FAILED, *failures, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return verdict(FAILED if failures else PASSED, *dict.fromkeys(failures))


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
