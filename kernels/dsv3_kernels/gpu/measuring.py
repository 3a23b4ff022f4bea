"""One row of the table of speeds: the kernel and the other ways, timed on fresh inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dsv3_kernels.gpu.case import BenchCase
from dsv3_kernels.gpu.report import Row
from dsv3_kernels.gpu.timing import Times, num_input_sets

Timer = Callable[[Callable[[Any], Any], Sequence[Any]], Times]
"""A function of inputs and its sets of inputs -> times of a launch."""


def measured(case: BenchCase, timer: Timer) -> Row:
    """The row of a case; what cannot run leaves a note."""
    make_inputs = jax.jit(case.make_inputs)
    sets = [make_inputs(key) for key in jax.random.split(jax.random.key(0), num_input_sets(case.num_bytes))]
    times, notes = _tried("kernel", case.kernel, timer, sets)
    others: dict[str, float | None] = {}
    for name, function in case.others.items():
        other, why = _tried(name, function, timer, sets)
        others[name] = other.median if other else None
        notes += why
    if times is None:
        return Row(case, None, others, notes)
    return Row(case, times.median, others, notes, (times.least, times.most), kernels=times.kernels)


def as_answer(row: Row) -> dict[str, Any]:
    """The times of a row as JSON has them; the case stays here."""
    return {name: getattr(row, name) for name in ("kernel", "others", "notes", "spread", "kernels")}


def from_answer(case: BenchCase, answer: Mapping[str, Any]) -> Row:
    """The inverse of `as_answer`."""
    spread = (answer["spread"][0], answer["spread"][1]) if answer["spread"] else None
    notes, kernels = tuple(answer["notes"]), tuple(answer["kernels"])
    return Row(case, answer["kernel"], answer["others"], notes, spread, kernels=kernels)


def _tried(
    name: str, function: Callable[[Any], Any], timer: Timer, sets: Sequence[Any]
) -> tuple[Times | None, tuple[str, ...]]:
    """The times, or the reason why there are none."""
    try:
        return timer(function, sets), ()
    except NotImplementedError as error:
        return None, (f"{name}: {error}",)
    except Exception as error:  # noqa: BLE001  one way's failure, whatever it raises, must not cost the other rows
        return None, (f"{name} failed: {(str(error).splitlines() or [type(error).__name__])[0]}",)
