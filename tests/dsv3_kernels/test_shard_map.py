"""Every op inside `jax.shard_map`: what two devices compute, over which axes of a mesh results vary, and kernels."""

import functools
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_kernels import dispatch
from tests.dsv3_kernels.splits import ALL, OPS, SPLITS, of_one_device

pytestmark = pytest.mark.usefixtures("compile_quickly")

REPEATED = (
    "decode: heads", "decode: pages", "prefill: sequences", "prefill: heads", "gradient of prefill: heads",
    "gradient of prefill: queries", "gradient of linear: tokens", "gradient of attention: columns",
)  # fmt: skip
"""Splits whose kernels another split has, too, and that take long to lower."""
LONG = ("gradient of experts: tokens", "gradient of experts: features", "gradient of bf16 experts: tokens")


def each(names: Iterable[str], *, slow: Container[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def on_two_devices(function: Callable[..., Any], specs: Any, out: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


@functools.cache
def program(name: str) -> Any:
    """What two devices run; traced once for all tests."""
    split = SPLITS[name]

    def of_a_device(*arrays: Any) -> Any:
        result = split.op(*arrays)
        return jax.lax.psum(result, "data") if split.out is None else result

    return on_two_devices(of_a_device, split.specs, ALL if split.out is None else split.out)


@pytest.mark.parametrize("name", each(SPLITS, slow=LONG))
def test_two_devices_give_what_one_does(name):
    found, expected = program(name)(*SPLITS[name].arrays), of_one_device(name.split(":")[0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        # Sums over devices in bfloat16 are of terms that each device has rounded.
        assert np.linalg.norm(ours - theirs) <= 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", OPS)
def test_results_vary_over_the_axes_of_the_arrays(name):
    """Whichever implementation a target gets: the types are the same for all."""
    op, arrays, specs, _ = SPLITS[name]
    with pytest.raises(ValueError, match="out_specs"):
        on_two_devices(op, specs, ALL).trace(*arrays)
    on_two_devices(op, tuple(ALL for _ in specs), ALL).trace(*arrays)


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="jax older than the kernels need")
@pytest.mark.parametrize("name", each(SPLITS, slow=(*REPEATED, LONG[0])))
def test_kernels_are_lowered_for_cuda(name):
    text = program(name).trace(*SPLITS[name].arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) != name.startswith("read"), "XLA gathers what is read"
