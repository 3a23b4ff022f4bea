"""Kernels that must be refused, each for its own reason, and one that is good.

Where Mosaic and ptxas obey a rule themselves no kernel breaks it: Mosaic raises for most bad descriptors, and ptxas
spills or ignores setmaxnreg before it passes what that grants. There the reports of the good kernel are altered.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_kernels.aot import judge, mlir
from dsv3_kernels.aot import selfcheck_kernels as kernels
from dsv3_kernels.aot.case import BF16_MMA, FP8_MMA, AotCase

GOOD = "self-check good"


class Alteration(NamedTuple):
    """A change of the good kernel's reports, and what every fault that is found then must contain."""

    report: str
    old: str
    new: str
    fault: str


REFUSED = {
    "self-check spill": ("spills", "has no QGMMA"),
    "self-check serialized": ("wgmma.mma_async instructions are serialized",),
    "self-check setmaxnreg": ("'setmaxnreg' ignored",),
    "self-check stride": ("2^40 or more",),
}
"""By case, what its faults contain: each of them one of these."""
ALTERED = (
    Alteration(".sass_ctrl", ", 0xe8", ", 0x18", "after setmaxnreg 24"),
    Alteration(
        mlir.SUFFIX, "memref<8x2x8x64xbf16, strided<[", "memref<1x1x8x2x8x64xbf16, strided<[8, 8, ", "6 dimensions"
    ),
    Alteration(mlir.SUFFIX, "strided<[1024, 64, 128, 1]>", "strided<[1024, 64, 132, 1]>", "no multiples of 16"),
    Alteration(mlir.SUFFIX, "constant 8 : i64", "constant 264 : i64", "side of the box outside 1 to 256"),
    Alteration(
        mlir.SUFFIX, "constant 64 : i64", "constant 60 : i64", "rows of 120 bytes in its box, no multiple of 16"
    ),
    Alteration(
        mlir.SUFFIX, "constant 128 : i64", "constant 64 : i64", "rows of 128 bytes in its box, over its swizzle of 64"
    ),
)


def aot_cases() -> list[AotCase]:
    """The good kernel and the bad ones, which `make test-aot` compiles first."""
    factors = (jax.ShapeDtypeStruct(kernels.FACTORS, jnp.bfloat16),) * 2
    many = jax.ShapeDtypeStruct(kernels.MANY, jnp.float32)
    far = jax.ShapeDtypeStruct(kernels.FAR, jnp.bfloat16)
    spill, serialized, setmaxnreg, stride = REFUSED
    return [
        AotCase(GOOD, kernels.specialised, factors, (BF16_MMA,)),
        AotCase(spill, kernels.spilling, (many,), (FP8_MMA,)),
        AotCase(serialized, kernels.printing, factors, (BF16_MMA,)),
        AotCase(setmaxnreg, kernels.starved, factors, (BF16_MMA,)),
        AotCase(stride, kernels.far_apart, (far,), ("UTMALDG",)),
    ]


def surprises(dumps: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What was judged otherwise than it should be; `dumps` has the reports of each case by its name."""
    cases = {case.name: case for case in aot_cases()}
    found = [_surprise(name, _faults(cases[name], dumps[name]), says) for name, says in {GOOD: (), **REFUSED}.items()]
    for report, old, new, fault in ALTERED:
        altered = {
            name: text.replace(old, new) if name.endswith(report) else text  # a report is named after its kernel
            for name, text in dumps[GOOD].items()
        }
        if altered == dumps[GOOD]:
            found.append(f"the report *{report} of {GOOD} has no {old!r} to alter")
        else:
            found.append(_surprise(f"{GOOD} with {new!r} for {old!r}", _faults(cases[GOOD], altered), (fault,)))
    return [surprise for surprise in found if surprise]


def _faults(case: AotCase, dump: Mapping[str, str]) -> list[str]:
    return judge.find_faults(case, judge.read_cost(case, dump), dump)


def _surprise(what: str, faults: list[str], says: tuple[str, ...]) -> str | None:
    """What is wrong if the faults of `what` are not exactly of the kinds `says`."""
    is_right = all(any(text in fault for fault in faults) for text in says)
    is_right &= all(any(text in fault for text in says) for fault in faults)
    return None if is_right else f"{what}, which should be {says or 'good'}, was judged {faults or 'good'}"
