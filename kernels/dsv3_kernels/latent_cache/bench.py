"""What writing the latent cache is compared with on a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison
from dsv3_kernels.latent_cache import api
from dsv3_kernels.latent_cache.cases import CASES, PAGE_SIZE, UGLY, Case
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM, ROW_BYTES, unpack_fp8_cache_rows

LIMITS = {False: 2.0**-7, True: 2.0**-5}
"""Of a row's error over its norm. Where a last bit of the mean changes a rounding, an element is off by a step of
bfloat16; or an element of E4M3 an eighth, or a scale a step of bfloat16, which changes a few per cent of its tile."""

ONE_ROW = Case("one_row", B=1, T=1, before=(63,))
"""The last of a page, of V3's widths."""


LAYERS = 61
"""Of V3: one write is shorter than the copy of a pool that jax makes of an input."""


def bench_cases() -> list[BenchCase]:
    """A step of all layers into one pool, which is copied once."""
    return [
        BenchCase(
            op="cache_write",
            name=f"{case.name}, {LAYERS} layers",
            make_inputs=functools.partial(_make_step, case),
            kernel=functools.partial(_step, case, form="pallas"),
            others={"XLA": functools.partial(_step, case, form="xla")},
            flops=0.0,
            num_bytes=num_bytes(case),
            is_quick=case is CASES[0],
            num_launches=LAYERS + 1,
        )
        for case in CASES
    ]


def num_bytes(case: Case) -> float:
    """Each layer's rows read and written, and the pool copied."""
    row = ROW_BYTES if case.fp8 else 2 * (case.C + case.R)
    rows = LAYERS * case.B * case.T * (2 * (case.C + case.R) + 4 * case.R + row)
    return float(rows + 2 * _num_pages(case) * PAGE_SIZE * row)


def check_cases() -> list[CheckCase]:
    """Every row of the pool, written or not, against the loop over rows."""
    return [
        CheckCase(
            op="cache_write",
            name=case.name,
            make_inputs=functools.partial(make_inputs, case),
            run=run,
            comparisons=(
                Comparison("worst row", jax.jit(functools.partial(run, form="reference")), worst_row, LIMITS[case.fp8]),
            ),
            is_small=case in UGLY or case is ONE_ROW,
            is_plain=(case.C, case.R) != (LATENT_DIM, ROPE_DIM),
            path="aliased memory" if case is ONE_ROW else "",
        )
        for case in (ONE_ROW, *UGLY, *(case._replace(T=min(case.T, 300)) for case in CASES))
        for run in (functools.partial(_run, fp8_scale=case.fp8_scale),)
    ]


def make_inputs(case: Case, key: jax.Array, num_pages: int | None = None) -> dict[str, Array]:
    """As `cases.make` on the device, in bfloat16; the last sequence gets a row less than the others, if it can.

    Twice as many pages as are needed, if no number is given.
    """
    keys = dict(zip(("down", "scale", "angles", "pages", "table"), jax.random.split(key, 5), strict=True))
    B, T = case.B, case.T
    starts = [case.before[b % len(case.before)] for b in range(B)]
    num_columns = -(-(max(starts) + T) // PAGE_SIZE)
    num_pages = num_pages or 2 * B * num_columns
    angles = jax.random.uniform(keys["angles"], (B, T, case.R // 2), maxval=6.0)
    if case.fp8:  # of zeros, which are no NaN
        pages = jnp.zeros((num_pages, PAGE_SIZE, ROW_BYTES), jnp.uint8)
    else:
        pages = jax.random.normal(keys["pages"], (num_pages, PAGE_SIZE, case.C + case.R), jnp.bfloat16)
    return {
        "kv_pages": pages,
        "kv_down": jax.random.normal(keys["down"], (B, T, case.C + case.R), jnp.bfloat16),
        "norm_scale": jax.random.uniform(keys["scale"], (case.C,), minval=0.5, maxval=1.5),
        "cos": jnp.cos(angles),
        "sin": jnp.sin(angles),
        "page_table": jax.random.permutation(keys["table"], num_pages)[: B * num_columns].reshape(B, num_columns),
        "starts": jnp.asarray(starts, jnp.int32),
        "counts": jnp.full(B, T, jnp.int32).at[-1].add(-(T > 1)),
    }


def _num_pages(case: Case) -> int:
    return case.B * -(-case.T // PAGE_SIZE)


def _make_step(case: Case, key: jax.Array) -> dict[str, Array]:
    """`make_inputs` at the start of a sequence, with no more pages than are written."""
    return make_inputs(case._replace(before=(0,)), key, num_pages=_num_pages(case))


def _step(case: Case, inputs: dict[str, Array], form: str) -> Array:
    def layer(_: Array, kv_pages: Array) -> Array:
        return _run(inputs | {"kv_pages": kv_pages}, form, fp8_scale=case.fp8_scale)

    return jax.lax.fori_loop(0, LAYERS, layer, inputs["kv_pages"])


def worst_row(found: Array, expected: Array) -> Array:
    """The largest |x - y| / |y| of any row of the pool; |x| where y is 0, NaN where there is one."""
    if found.dtype == jnp.uint8:
        found, expected = (jnp.concatenate(unpack_fp8_cache_rows(pages), axis=-1) for pages in (found, expected))
    x, y = found.astype(jnp.float32), expected.astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(y * y, axis=-1))
    error = jnp.sqrt(jnp.sum((x - y) ** 2, axis=-1)) / jnp.where(size > 0, size, jnp.float32(1))
    return jnp.where(jnp.isnan(error).any(), jnp.float32(jnp.nan), error.max())


def _run(inputs: dict[str, Any], form: str, fp8_scale: str = "float32") -> Array:
    return api.cache_write(**inputs, eps=1e-6, fp8_scale=fp8_scale, implementation=form)
