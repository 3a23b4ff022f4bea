"""Runs the Hopper kernel of `cache_write` in Pallas' interpreter and compares it with the loop over rows.

`python interpreted.py CASE ...`, names of CASES below, `--seed N` for the shapes and inputs of an earlier run. Prints
the seed, then one JSON object a case. A program of its own, because a failed callback of the
interpreter can wait for ever.
"""

import argparse
import functools
import json
import time

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
"""So many, and so great a part of the written bytes, may differ: the mean square's last bit may change a rounding."""


def main(name: str, seed: int, *, detect_races: bool) -> None:
    rng = np.random.default_rng([seed, *name.encode()])
    dtype, case = CASES.get(name) or (jnp.bfloat16, drawn(name, rng))
    given = _inputs(case, dtype, rng)
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
    tolerance = 2**-2 if case.fp8 else 2**-7  # two steps of E4M3, one of bfloat16
    ours, theirs = _numbers(ours), _numbers(theirs)
    races = bool(detect_races and interpret_pallas_call.get_races().races_found)
    report = {
        "name": name,
        "case": case._asdict(),
        "is_close": bool(np.allclose(ours, theirs, rtol=tolerance, atol=2**-6, equal_nan=True)),
        "different_bytes": int(different.sum()),
        "most_different_bytes": OTHER_BYTES[0] + OTHER_BYTES[1] * different.size,
        "races": races,
        "seed": seed,
    }
    print(json.dumps(report), flush=True)


def drawn(name: str, rng: np.random.Generator) -> Case:
    """A few sequences of any lengths, with or without FP8 rows."""
    B, T, fp8 = int(rng.integers(1, 4)), int(rng.integers(1, 6)), name.endswith("-fp8")
    before = tuple(int(length) for length in rng.integers(0, 130, B))
    return Case(name, B=B, T=T, before=before, fp8=fp8, fp8_scale=str(rng.choice(["float32", "ue8m0"])))


def _inputs(case: Case, dtype, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """With any bits in the pool, NaN too, and rows that go nowhere; one row has a NaN, another a NaN in its key."""
    given = make(case, dtype, seed=int(rng.integers(2**32)))
    bits = rng.integers(0, 256, given["kv_pages"].shape[:2] + (656 if case.fp8 else 1152,), np.uint8)
    given["kv_pages"] = bits if case.fp8 else bits.view(jnp.bfloat16)
    if case.T == 1:
        return given
    given["counts"] = np.maximum(case.T - np.arange(case.B, dtype=np.int32), 0)
    given["kv_down"][0, -1, 5] = given["kv_down"][-1, 1, 512 + 6] = np.nan
    if case.B > 2 and given["page_table"].shape[1] > 1:  # before the pool, behind it, a start that is not there
        given["page_table"][1, 1], given["page_table"][2, 0] = -7, len(bits) + 9
        given["starts"][0] = -2
    return given


def _bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


def _numbers(rows: np.ndarray) -> np.ndarray:
    """In float32; of FP8 rows the dequantised, which show how far off they are."""
    if rows.dtype == np.uint8:
        rows = np.concatenate(unpack_fp8_cache_rows(rows), axis=-1)
    return rows.astype(np.float32)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--races", action="store_true")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    arguments = parser.parse_args()
    print(json.dumps({"seed": arguments.seed}), flush=True)
    for argument in arguments.cases:
        main(argument, arguments.seed, detect_races=arguments.races)
