"""Runs the Hopper kernels of `mla_decode` in Pallas' interpreter and compares them with float32 and float64.

`python interpreted.py CASE ...`, names of CASES or COMBINATIONS below. A program of its own, because a failed callback
of the interpreter can wait for ever.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.cases import LATENT_DIM, SOFTMAX_SCALE, DecodeCase, DecodeInputs, make_inputs
from dsv3_kernels.decode_attention.pallas_combine import combine_parts
from dsv3_kernels.decode_attention.pallas_sm90 import mla_decode_pallas
from dsv3_kernels.decode_attention.planner import plan_splits
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from tests.dsv3_kernels.decode_attention.combine import combine
from tests.dsv3_kernels.errors import flash_mismatch


def given(num_queries: int, num_heads: int, *lengths: int, **options: bool) -> DecodeCase:
    return DecodeCase(len(lengths), num_queries, num_heads, max(lengths), given_lengths=lengths, **options)


CASES = {  # parts, the case
    "splits": (3, given(2, 9, 0, 300, 65)),
    "two-row-blocks": (5, given(4, 17, 64, 1, 0, 700)),  # which share copies of pages
    "two-row-blocks-alone": (5, given(4, 17, 64, 1, 0, 700)),
    "fp8": (2, given(2, 9, 0, 197, is_fp8=True)),
    "not-causal": (1, given(3, 1, 2, 129, causal=False)),
    "one-sequence": (5, given(1, 65, 300)),
    "all-empty": (2, given(2, 9, 0, 0)),
    "stray-pages": (2, given(1, 3, 100, 70)),
    "stray-pages-fp8": (2, given(1, 3, 100, 70, is_fp8=True)),
}

COMBINATIONS = {  # rows, parts, lengths; sequences in 2, 3, 5 and 9 parts, which the kernel visits four at a time
    "combine-one-sequence": (64, 5, (5000,)),
    "combine-none-split": (8, 3, (128, 100, 1)),
    "combine-all-split": (128, 5, (1000, 900)),
    "combine-some-empty": (8, 12, (1000, 0, 128, 5000, 0)),
    "combine-no-work": (8, 9, (256, 0)),  # more parts than blocks: some of them between cuts at one place
}


def attend(name: str, *, detect_races: bool) -> None:
    """The whole of `mla_decode` against its float32 reference."""
    num_parts, case = CASES[name]
    inputs = make_inputs(case)
    if name.startswith("stray-pages"):
        _stray(inputs)
    q_latent, q_rope, kv_pages, page_table, seq_lens = map(jnp.asarray, inputs)
    kv = inputs.kv_pages
    if case.is_fp8:
        kv = np.concatenate(unpack_fp8_cache_rows(kv), axis=-1)
    options = {"softmax_scale": SOFTMAX_SCALE, "causal": case.causal}
    floats = [x.astype(jnp.float32) for x in (q_latent, q_rope, jnp.asarray(kv))]
    out, lse = mla_decode_reference(*floats, page_table, seq_lens, **options)
    ours = mla_decode_pallas(
        *(q_latent, q_rope, kv_pages, page_table, seq_lens),
        **options,
        num_parts=num_parts,
        multicast=not name.endswith("alone"),
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )
    wrong = flash_mismatch(ours[0], out, absolute=8e-4, relative=2.01 / 128, cosine=5e-6)
    assert wrong is None, f"out of {name}: {wrong}"
    wrong = flash_mismatch(ours[1], lse, absolute=1e-6, relative=8.01 / 65536, cosine=5e-6)
    assert wrong is None, f"lse of {name}: {wrong}"
    if detect_races:
        assert not interpret_pallas_call.get_races().races_found, f"races in {name}"


def merge(name: str, *, detect_races: bool) -> None:
    """The parts of split sequences against a float64 sum and the plain form, twice over different garbage."""
    num_rows, num_parts, lengths = COMBINATIONS[name]
    plan = plan_splits(jnp.array(lengths, jnp.int32), num_parts=num_parts)
    num_splits, seed = np.asarray(plan.num_splits), int.from_bytes(os.urandom(4))
    slots = {
        b: [2 * (first + i) + (i == 0) for i in range(num_splits[b])]
        for b, first in enumerate(np.asarray(plan.first_part).tolist())
        if num_splits[b] > 1
    }
    assert (name == "combine-none-split") == (not slots)
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((len(lengths), num_rows, LATENT_DIM), np.float32).astype(ml_dtypes.bfloat16)
    lse = rng.normal(size=out.shape[:2]).astype(np.float32)
    part_out = rng.standard_normal((2 * num_parts, num_rows, LATENT_DIM), np.float32)
    part_lse = (rng.normal(size=(2 * num_parts, num_rows)) * rng.choice([1, 300])).astype(np.float32)
    is_empty = rng.random(part_lse.shape) < 0.2
    is_empty[:, 7] = True
    part_out[is_empty], part_lse[is_empty] = 0, -np.inf
    unused = np.setdiff1d(np.arange(2 * num_parts), [slot for own in slots.values() for slot in own])

    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    run, results = jax.jit(functools.partial(combine_parts, interpret=params)), []
    for garbage in (np.nan, np.inf):
        out[list(slots)], lse[list(slots)] = garbage, garbage
        part_out[unused], part_lse[unused] = garbage, garbage
        arguments = [jnp.asarray(x) for x in (out, lse, part_out, part_lse)]
        results.append([np.asarray(x) for x in run(*arguments, plan)])
    (ours, ours_lse), again = results
    assert ours.tobytes() == again[0].tobytes(), f"{name}, seed {seed}"
    assert ours_lse.tobytes() == again[1].tobytes(), f"{name}, seed {seed}"
    twin, twin_lse = combine(*arguments, plan)
    expected, expected_lse = out.astype(np.float64), lse.astype(np.float64)
    for b, own in slots.items():
        expected[b], expected_lse[b] = _merged(part_out[own].astype(np.float64), part_lse[own].astype(np.float64))
        for close in (expected, np.asarray(twin).astype(np.float64)):  # a rounding to BF16, or two apart
            np.testing.assert_allclose(ours[b].astype(np.float64), close[b], rtol=2**-7, atol=1e-5, err_msg=str(seed))
    for close in (expected_lse, twin_lse):
        np.testing.assert_allclose(ours_lse, close, rtol=1e-6, atol=1e-6, err_msg=str(seed))
    whole = [b for b in range(len(lengths)) if b not in slots]
    assert ours[whole].tobytes() == out[whole].tobytes()
    if detect_races:
        assert not interpret_pallas_call.get_races().races_found, f"races in {name}"


def _merged(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts [P, R, C] and their lses [P, R] as one softmax."""
    largest = lses.max(0)
    has_keys = np.isfinite(largest)
    origin = np.where(has_keys, largest, 0.0)
    weights = np.exp(lses - origin)
    total = np.where(has_keys, weights.sum(0), 1.0)
    merged = (weights[:, :, None] * outs).sum(0) / total[:, None]
    return merged, np.where(has_keys, origin + np.log(total), np.inf)


def _stray(inputs: DecodeInputs) -> None:
    """Full pages at both ends of the pool, and page ids beyond them, within the lengths."""
    pages, table = inputs.kv_pages, inputs.page_table
    first, last = pages[table[0, 0]].copy(), pages[table[1, 0]].copy()
    pages[0], pages[-1] = first, last
    table[0, 0], table[1, 0] = -7, len(pages) + 9


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    arguments = sys.argv[1:]
    for argument in arguments:
        if argument != "--races":
            check = merge if argument in COMBINATIONS else attend
            check(argument, detect_races="--races" in arguments)
    print("close")
