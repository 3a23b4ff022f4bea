"""Runs the Hopper kernel of `cache_write` in Pallas' interpreter and compares it with the loop over rows.

`python interpreted.py CASE ...`, names of CASES below. A program of its own, because a failed callback of the
interpreter can wait for ever.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.latent_cache import pallas_sm90, reference
from dsv3_kernels.latent_cache.cases import Case, make
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows

CASES = {  # pages, down-projection, the case
    "one": (jnp.bfloat16, Case("one", B=1, T=1, before=(63,))),
    "three": (jnp.bfloat16, Case("three", B=3, T=1, before=(0, 62, 127))),
    "page-ends": (jnp.bfloat16, Case("page-ends", B=5, T=3, before=(0, 61, 62, 63, 64))),
    "long": (jnp.bfloat16, Case("long", B=2, T=70, before=(1, 127))),
    "from-float32": (np.float32, Case("from-float32", B=2, T=3, before=(61, 62))),
    "one-fp8": (jnp.bfloat16, Case("one-fp8", B=1, T=1, before=(0,), fp8=True)),
    "three-fp8": (jnp.bfloat16, Case("three-fp8", B=3, T=1, before=(0, 62, 127), fp8=True)),
    "page-ends-fp8": (jnp.bfloat16, Case("page-ends-fp8", B=5, T=3, before=(0, 61, 62, 63, 64), fp8=True)),
    "long-fp8": (jnp.bfloat16, Case("long-fp8", B=2, T=70, before=(1, 127), fp8=True)),
    "one-ue8m0": (jnp.bfloat16, Case("one-ue8m0", B=1, T=1, before=(64,), fp8=True, fp8_scale="ue8m0")),
    "page-ends-ue8m0": (
        jnp.bfloat16,
        Case("page-ends-ue8m0", B=5, T=3, before=(0, 61, 62, 63, 64), fp8=True, fp8_scale="ue8m0"),
    ),
    "long-ue8m0": (jnp.bfloat16, Case("long-ue8m0", B=2, T=70, before=(1, 127), fp8=True, fp8_scale="ue8m0")),
}
OTHER_BYTES = 4, 1e-3
"""So many, and of the written bytes so great a part, may differ: a last bit of the mean square may turn a rounding."""


def main(name: str, *, detect_races: bool) -> None:
    dtype, case = CASES[name]
    given = _inputs(case, dtype)
    write = functools.partial(
        pallas_sm90.write,
        eps=1e-6,
        fp8_scale=case.fp8_scale,
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )
    ours = np.asarray(jax.jit(write)(**given))
    theirs = np.asarray(jax.jit(functools.partial(reference.write, eps=1e-6, fp8_scale=case.fp8_scale))(**given))
    before, ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (given["kv_pages"], ours, theirs))
    is_written = (_bytes(theirs) != _bytes(before)).any(1)
    np.testing.assert_array_equal((_bytes(ours) != _bytes(before)).any(1), is_written, f"slots of {name}")
    ours, theirs = ours[is_written], theirs[is_written]
    different = _bytes(ours) != _bytes(theirs)
    assert different.sum() <= OTHER_BYTES[0] + OTHER_BYTES[1] * different.size, f"{different.sum()} bytes of {name}"
    tolerance = 2**-2 if case.fp8 else 2**-7  # two steps of E4M3, one of bfloat16
    np.testing.assert_allclose(_numbers(ours), _numbers(theirs), rtol=tolerance, atol=2**-6, err_msg=name)
    if detect_races:
        assert not interpret_pallas_call.get_races().races_found, f"races in {name}"


def _inputs(case: Case, dtype) -> dict[str, np.ndarray]:
    """With any bits in the pool, NaN too, and rows that go nowhere; one row has a NaN, another a NaN in its key."""
    rng = np.random.default_rng()
    given = make(case, dtype, seed=int(rng.integers(2**32)))
    bits = rng.integers(0, 256, given["kv_pages"].shape[:2] + (656 if case.fp8 else 1152,), np.uint8)
    given["kv_pages"] = bits if case.fp8 else bits.view(jnp.bfloat16)
    if case.T == 1:
        return given
    given["counts"] = np.maximum(case.T - np.arange(case.B, dtype=np.int32), 0)
    given["kv_down"][0, -1, 5] = given["kv_down"][1, 1, 512 + 6] = np.nan
    if case.B > 2:  # before the pool, behind it, a start that is not there
        given["page_table"][1, 1], given["page_table"][2, 0] = -7, len(bits) + 9
        given["starts"][0] = -2
    return given


def _bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def _numbers(rows: np.ndarray) -> np.ndarray:
    """In float32; of FP8 rows the dequantised, which tell how far off they are."""
    if rows.dtype == np.uint8:
        rows = np.concatenate(unpack_fp8_cache_rows(rows), axis=-1)
    return rows.astype(np.float32)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    arguments = sys.argv[1:]
    for argument in arguments:
        if argument != "--races":
            main(argument, detect_races="--races" in arguments)
    print("the same rows")
