"""Compares the kernels of prefill attention with the reference in Pallas' interpreter: `python interpreted.py CASE`.

A program of its own, because a failed callback of the interpreter can wait for ever.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.prefill_attention import pallas_sm90, reference
from dsv3_kernels.prefill_attention.cases import Case, make

CASES = {
    "one document": (Case("", B=1, T=130, S=130, H=1), None),
    "chunk of packed": (Case("", B=1, T=70, S=200, H=1, num_documents=3), None),
    "unequal starts": (Case("", B=2, T=100, S=200, H=2, num_documents=2), (0, 150)),
}
"""Two tiles of queries and keys; keys of other documents behind and before; queries before and behind all keys."""

MOST = {"out": 4e-3, "lse": 1e-5, "d_q": 6e-3, "d_k": 6e-3, "d_v": 6e-3}
"""Norm of the error against float32, over the norm: bfloat16 rounds by 2^-9 of each factor and result."""


def main(name: str) -> None:
    case, starts = CASES[name]
    given = {key: None if x is None else jnp.asarray(x) for key, x in make(case, jnp.bfloat16).items()}
    ids = given["q_segment_ids"], given["kv_segment_ids"]
    starts = None if starts is None else jnp.asarray(starts, jnp.int32)

    def run(attend, dtype):
        def of_floats(q, k, v):
            return attend(q, k, v, *ids, starts, softmax_scale=case.qk_dim**-0.5)

        out, backward = jax.vjp(of_floats, *(given[key].astype(dtype) for key in ("q", "k", "v")))
        blind = jnp.isinf(out[1])
        d_lse = jnp.where(blind, 0.0, given["d_lse"].astype(jnp.float32))
        return *out, *backward((given["d_out"].astype(dtype), d_lse))

    kernel = run(partial(pallas_sm90.attend, interpret=plgpu.InterpretGPUParams()), jnp.bfloat16)
    truth = run(reference.attend, jnp.float32)
    for (part, most), ours, theirs in zip(MOST.items(), kernel, truth, strict=True):
        ours, theirs = np.asarray(ours).astype(np.float64), np.asarray(theirs).astype(np.float64)
        assert ours.shape == theirs.shape, (part, ours.shape, theirs.shape)
        np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs), err_msg=f"{name}: {part}")
        ours, theirs = (np.where(np.isinf(x), 0, x) for x in (ours, theirs))
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"{name}: {part} {error:.1e}")
        assert error < most, f"{name}: {part} is off by {error:.1e} of its norm"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for argument in sys.argv[1:]:
        main(argument)
