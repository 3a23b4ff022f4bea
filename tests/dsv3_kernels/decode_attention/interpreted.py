"""Runs the Hopper kernel of `mla_decode` in Pallas' interpreter and compares it with float32.

`python interpreted.py CASE ...`, names of CASES below. A program of its own, because a failed callback of the
interpreter can wait for ever.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.cases import SOFTMAX_SCALE, DecodeCase, DecodeInputs, make_inputs
from dsv3_kernels.decode_attention.pallas_sm90 import mla_decode_pallas
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from dsv3_kernels.testing import flash_mismatch


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


def main(name: str, *, detect_races: bool) -> None:
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
            main(argument, detect_races="--races" in arguments)
    print("close")
