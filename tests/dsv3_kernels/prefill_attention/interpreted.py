"""Compares the kernels of prefill attention with the reference in Pallas' interpreter.

`python interpreted.py CASE ...`, names of CASES below, "drawn" or "drawn packed", `--seed N` for the shapes and inputs
of an earlier run. Prints the seed, then one JSON object a case. A program of its own, because a failed callback of the
interpreter can wait for ever.
"""

import argparse
import json
import time
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
"""Norm of the error against float32, over the norm: bfloat16 rounds by 2^-9 of each factor and result. Over 1 where the
norm is smaller: a query that sees one key has no gradient."""
FEW = 8
"""Queries whose roundings are too few to even out: twice the errors. dP - D of one query and two keys may cancel."""


def drawn(rng: np.random.Generator, *, is_packed: bool) -> tuple[Case, tuple[int, ...]]:
    """Up to two tiles of queries and of keys; the queries anywhere, of packed documents near the end of the keys."""
    S = int(rng.integers(1, 250))
    T = int(rng.integers(1, min(S, 150) + 1))
    if is_packed:
        return Case("", B=1, T=T, S=S, H=1, num_documents=int(rng.integers(2, 5))), (S - T + int(rng.integers(-3, 4)),)
    return Case("", B=1, T=T, S=S, H=1), (int(rng.integers(-T, S + 1)),)


def main(name: str, seed: int) -> None:
    rng = np.random.default_rng([seed, *name.encode()])
    case, first = CASES.get(name) or drawn(rng, is_packed=name == "drawn packed")
    arrays = make(case, jnp.bfloat16, seed=int(rng.integers(2**32)))
    given = {key: None if x is None else jnp.asarray(x) for key, x in arrays.items()}
    ids = given["q_segment_ids"], given["kv_segment_ids"]
    starts = None if first is None else jnp.asarray(first, jnp.int32)

    def run(attend, dtype):
        def of_floats(q, k, v):
            return attend(q, k, v, *ids, starts, softmax_scale=case.qk_dim**-0.5)

        out, backward = jax.vjp(of_floats, *(given[key].astype(dtype) for key in ("q", "k", "v")))
        blind = jnp.isinf(out[1])
        d_lse = jnp.where(blind, 0.0, given["d_lse"].astype(jnp.float32))
        return *out, *backward((given["d_out"].astype(dtype), d_lse))

    kernel = run(partial(pallas_sm90.attend, interpret=plgpu.InterpretGPUParams()), jnp.bfloat16)
    truth = run(reference.attend, jnp.float32)
    errors = {}
    for part, ours, theirs in zip(MOST, kernel, truth, strict=True):
        ours, theirs = np.asarray(ours).astype(np.float64), np.asarray(theirs).astype(np.float64)
        assert ours.shape == theirs.shape, (part, ours.shape, theirs.shape)
        np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs), err_msg=f"{name}, seed {seed}: {part}")
        ours, theirs = (np.where(np.isinf(x), 0, x) for x in (ours, theirs))
        errors[part] = float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1.0))
    most = {part: error * (2 if case.T < FEW else 1) for part, error in MOST.items()}
    about = {"name": name, "case": case._asdict(), "starts": first, "errors": errors, "most": most, "seed": seed}
    print(json.dumps(about), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    arguments = parser.parse_args()
    print(json.dumps({"seed": arguments.seed}), flush=True)
    for argument in arguments.cases:
        main(argument, arguments.seed)
