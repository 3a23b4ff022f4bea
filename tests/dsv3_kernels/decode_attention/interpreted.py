"""Runs the Hopper kernels of `mla_decode` in Pallas' interpreter and compares them with float32 and float64.

`python interpreted.py [--seed N] [--races] CASE ...` with names of CASES, COMBINATIONS or PLANS below. A program of its
own, because a failed callback of the interpreter can wait for ever. It prints a line of JSON for each case that passes.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.cases import LATENT_DIM, SOFTMAX_SCALE, DecodeCase, DecodeInputs, make_inputs
from dsv3_kernels.decode_attention.pallas_attend import Partials
from dsv3_kernels.decode_attention.pallas_combine import combine_parts
from dsv3_kernels.decode_attention.pallas_plan import plan_parts
from dsv3_kernels.decode_attention.pallas_sm90 import mla_decode_pallas
from dsv3_kernels.decode_attention.planner import num_parts, plan_splits
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from tests.dsv3_kernels.decode_attention.combine import combine
from tests.dsv3_kernels.errors import flash_mismatch


def given(num_queries: int, num_heads: int, *lengths: int, **options: bool) -> DecodeCase:
    return DecodeCase(len(lengths), num_queries, num_heads, max(lengths), given_lengths=lengths, **options)


def drawn(rng: np.random.Generator) -> tuple[int, DecodeCase]:
    """Multiprocessors, and a case of one or two sequences and blocks of rows."""
    num_queries = int(rng.integers(1, 4))
    num_heads = int(rng.integers(1, 128 // num_queries))
    lengths = rng.integers(0, 200, rng.integers(1, 3)).tolist()
    causal, is_fp8 = (bool(rng.integers(2)) for _ in range(2))
    return int(rng.integers(1, 9)), given(num_queries, num_heads, *lengths, causal=causal, is_fp8=is_fp8)


CASES = {  # multiprocessors, the case
    "splits": (3, given(2, 9, 0, 300, 65)),
    "two-row-blocks": (10, given(4, 17, 64, 1, 0, 700)),  # which share copies of pages
    "two-row-blocks-alone": (10, given(4, 17, 64, 1, 0, 700)),
    "fp8": (2, given(2, 9, 0, 197, is_fp8=True)),
    "not-causal": (1, given(3, 1, 2, 129, causal=False)),
    "one-sequence": (10, given(1, 65, 300)),
    "all-empty": (2, given(2, 9, 0, 0)),
    "stray-pages": (2, given(1, 3, 100, 70)),
    "stray-pages-fp8": (2, given(1, 3, 100, 70, is_fp8=True)),
    "beyond-table": (3, given(1, 3, 0, 70, 256)),
    "drawn": (0, None),
}

COMBINATIONS = {  # queries, heads, parts, lengths; sequences in 2, 3, 5 and 9 parts, which are visited four at a time
    "combine-one-sequence": (1, 64, 5, (5000,)),
    "combine-none-split": (2, 4, 3, (128, 100, 1, 0, 0, 5)),
    "combine-all-split": (1, 128, 5, (1000, 900)),
    "combine-some-empty": (2, 3, 12, (1000, 0, 128, 5000, 0)),
    "combine-no-work": (8, 1, 9, (256, 0)),  # more parts than blocks: some of them between cuts at one place
}

PLANS = {"plan-few": ((1, 5), (8, 3)), "plan-b7": ((7, 16), (1, 1)), "plan-b128": ((128, 9),), "plan-b300": ((300, 4),)}
"""Sequences and parts."""


def attend(name: str, seed: int, *, detect_races: bool) -> dict:
    """The whole of `mla_decode` against its float32 reference; the plan is given or not, by the seed."""
    rng = np.random.default_rng(seed)
    num_sms, case = drawn(rng) if name == "drawn" else CASES[name]
    inputs = make_inputs(case, seed)
    if name.startswith("stray-pages"):
        _stray(inputs)
    q_latent, q_rope, kv_pages, page_table, seq_lens = map(jnp.asarray, inputs)
    kv = inputs.kv_pages
    if case.is_fp8:
        kv = np.concatenate(unpack_fp8_cache_rows(kv), axis=-1)
    options = {"softmax_scale": SOFTMAX_SCALE, "causal": case.causal}
    floats = [x.astype(jnp.float32) for x in (q_latent, q_rope, jnp.asarray(kv))]
    out, lse = mla_decode_reference(*floats, page_table, seq_lens, **options)
    if name == "beyond-table":  # lengths count as 0, and as what the table holds
        page_table, seq_lens = page_table[:, :4], seq_lens + jnp.array([-(2**31), 0, 2**31 - 257], jnp.int32)
    plan, own_lens = None, seq_lens
    if is_planned := bool(rng.integers(2)):
        count = num_parts(num_sms, num_queries=case.num_queries, num_heads=case.num_heads)
        plan, own_lens = plan_splits(seq_lens, num_parts=count), jnp.zeros_like(seq_lens)  # not read
    ours = mla_decode_pallas(
        *(q_latent, q_rope, kv_pages, page_table, own_lens, plan),
        **options,
        num_sms=num_sms,
        multicast=not name.endswith("alone"),
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )
    report = {"shape": case.name, "lengths": inputs.seq_lens.tolist(), "num_sms": num_sms, "is_planned": is_planned}
    wrong = flash_mismatch(ours[0], out, absolute=8e-4, relative=2.01 / 128, cosine=5e-6)
    assert wrong is None, f"out of {name}, seed {seed}, {report}: {wrong}"
    wrong = flash_mismatch(ours[1], lse, absolute=1e-6, relative=8.01 / 65536, cosine=5e-6)
    assert wrong is None, f"lse of {name}, seed {seed}, {report}: {wrong}"
    return report


def merge(name: str, seed: int, *, detect_races: bool) -> dict:
    """The parts of split sequences against a float64 sum and the plain implementation, twice over different garbage."""
    num_queries, num_heads, count, lengths = COMBINATIONS[name]
    num_rows = num_queries * num_heads
    room = -(-num_rows // 8) * 8
    parts = plan_splits(jnp.array(lengths, jnp.int32), num_parts=count).parts
    slots = {
        last_seq: [2 * (part + i) + (i == 0) for i in range(num_splits)]
        for part, (_, _, last_seq, _, num_splits) in enumerate(np.asarray(parts).tolist())
        if num_splits > 1
    }
    assert (name == "combine-none-split") == (not slots)
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((len(lengths), room, LATENT_DIM), np.float32).astype(ml_dtypes.bfloat16)
    lse = rng.normal(size=out.shape[:2]).astype(np.float32)
    part_out = rng.standard_normal((2 * count, room, LATENT_DIM), np.float32)
    part_lse = (rng.normal(size=(2 * count, room)) * rng.choice([1, 300])).astype(np.float32)
    is_empty = rng.random(part_lse.shape) < 0.2
    is_empty[:, 5] = True
    part_out[is_empty], part_lse[is_empty] = 0, -np.inf
    unused = np.setdiff1d(np.arange(2 * count), [slot for own in slots.values() for slot in own])

    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    run = jax.jit(functools.partial(combine_parts, num_queries=num_queries, num_heads=num_heads, interpret=params))
    results = []
    for garbage in (np.nan, np.inf):
        out[list(slots)], lse[list(slots)] = garbage, garbage
        part_out[unused], part_lse[unused] = garbage, garbage
        arguments = [jnp.asarray(x) for x in (out, lse, part_out, part_lse)]
        results.append([np.asarray(x) for x in run(Partials(*arguments), parts)])
    (ours, ours_lse), again = results
    assert ours.tobytes() == again[0].tobytes(), f"{name}, seed {seed}"
    assert ours_lse.tobytes() == again[1].tobytes(), f"{name}, seed {seed}"
    assert ours_lse.shape == (len(lengths), num_heads, num_queries)
    ours_lse = ours_lse.transpose(0, 2, 1).reshape(len(lengths), num_rows)
    twin, twin_lse = combine(*arguments, parts)
    expected, expected_lse = out.astype(np.float64), lse.astype(np.float64)
    for b, own in slots.items():
        expected[b], expected_lse[b] = _merged(part_out[own].astype(np.float64), part_lse[own].astype(np.float64))
        for close in (expected, np.asarray(twin).astype(np.float64)):  # a rounding to BF16, or two apart
            np.testing.assert_allclose(ours[b].astype(np.float64), close[b], rtol=2**-7, atol=1e-5, err_msg=str(seed))
    for close in (expected_lse, twin_lse):
        np.testing.assert_allclose(ours_lse, close[:, :num_rows], rtol=1e-6, atol=1e-6, err_msg=str(seed))
    whole = [b for b in range(len(lengths)) if b not in slots]
    assert ours[whole].tobytes() == out[whole].tobytes()
    return {}


def plan(name: str, seed: int, *, detect_races: bool) -> dict:
    """The plan against its twin, element by element."""
    rng = np.random.default_rng(seed)
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    for num_seqs, count in PLANS[name]:
        for lengths in (np.zeros(num_seqs), rng.integers(0, 3000, num_seqs) * (rng.random(num_seqs) < 0.8)):
            seq_lens = jnp.asarray(lengths, jnp.int32)
            ours, twin = (
                np.asarray(each(seq_lens, num_parts=count).parts)
                for each in (functools.partial(plan_parts, interpret=params), plan_splits)
            )
            np.testing.assert_array_equal(ours, twin, err_msg=f"seed {seed}, lengths {seq_lens}, {count} parts")
    return {}


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*CASES, *COMBINATIONS, *PLANS])
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--races", action="store_true")
    options = parser.parse_args()
    print(f"--seed {options.seed}", file=sys.stderr, flush=True)
    for case in options.cases:
        check = attend if case in CASES else merge if case in COMBINATIONS else plan
        report = check(case, options.seed, detect_races=options.races)
        if options.races:
            assert not interpret_pallas_call.get_races().races_found, f"races in {case}, seed {options.seed}"
        print(json.dumps({"case": case, "seed": options.seed, **report}), flush=True)
