"""Causal attention over expanded keys and values: what prefill and training of MLA compute (report eq. 10)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_kernels import dispatch
from dsv3_kernels.prefill_attention import limits, reference, xla
from dsv3_kernels.prefill_attention.differentiable import REVERSE_ONLY, differentiable
from dsv3_kernels.varying import varying_alike


def mla_prefill(
    q: Float[Array | np.ndarray, "B T H J"],
    k: Float[Array | np.ndarray, "_B S _H _J"],
    v: Float[Array | np.ndarray, "_B _S _H W"],
    q_segment_ids: Int[Array | np.ndarray, "_B _T"] | None = None,
    kv_segment_ids: Int[Array | np.ndarray, "_B _S"] | None = None,
    *,
    softmax_scale: float,
    q_starts: Int[Array | np.ndarray, "_B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B H T"]]:
    """softmax(softmax_scale · q kᵀ) v, where query t sees keys up to its own position within its own segment.

    Query t of sequence b stands beside key q_starts[b] + t, by default beside key S - T + t: a chunk of queries at the
    end of a longer row of keys (bottom-right). Keys past a sequence's last query are thus unseen and may hold any
    finite values. Scores, softmax and sums are float32 (float64 for float64). Differentiable in q, k, v through both
    results; memory is linear in T and S, but for "reference".

    Args:
        q: queries, J = I + R wide (192 in V3).
        k: keys, S of them, the rope part repeated for each head.
        v: values, W wide (128 in V3).
        q_segment_ids: the document of each query; None means one document. In any order.
        kv_segment_ids: the document of each key; None means that of the queries, where T = S.
        softmax_scale: the factor on scores.
        q_starts: the key beside each sequence's first query; data, so other values compile nothing. With it T may
            exceed S: a query may then stand before the first key or behind the last.
        implementation: None, "reference", "xla", or "pallas" (Hopper; bfloat16, J = 192, W = 128).
    Returns:
        out: in the dtype of q; zeros for a query that sees no key.
        lse: ln Σ exp(scores), float32 (float64 for float64); +inf for a query that sees no key.
    Raises:
        ValueError: shapes or dtypes that do not fit together, an empty array, or T > S without `q_starts`.
        NotImplementedError: `implementation="pallas"` where it cannot run.
    """
    q_segment_ids, kv_segment_ids = _checked(q, k, v, q_segment_ids, kv_segment_ids, q_starts)
    arrays = jax.tree.map(jnp.asarray, (q, k, v, q_segment_ids, kv_segment_ids, q_starts))
    if implementation == "reference":
        return reference.attend(*arrays, softmax_scale=float(softmax_scale))
    settings = {"softmax_scale": float(softmax_scale)}
    return differentiable(
        partial(dispatch.run, FORWARD, implementation, **settings),
        partial(dispatch.run, GRADIENTS, implementation, **settings),
        varying_alike(*arrays),
    )


def _pallas(name: str, *args, **kwargs):
    """Imported when first used: jax older than the kernels need has no such modules."""
    from dsv3_kernels.prefill_attention import pallas_sm90

    return getattr(pallas_sm90, name)(*args, **kwargs)


FORWARD = dispatch.Op(
    "mla_prefill",
    reference=reference.attend,
    xla=xla.attend,
    kernel=partial(_pallas, "attend"),
    refuses=limits.refuses,
    axes="bthj bshj bshw bt bs b -> bthw bht",
    no_gradient=REVERSE_ONLY,
    has_causal_mask=True,
)
GRADIENTS = dispatch.Op(
    "mla_prefill",
    reference=xla.gradients,
    xla=xla.gradients,
    kernel=partial(_pallas, "gradients"),
    refuses=limits.refuses,
    axes="bthj bshj bshw bt bs b bthw bht bthw bht -> bthj bshj bshw",
    no_gradient=REVERSE_ONLY,
    has_causal_mask=True,
)


def _checked(q, k, v, q_segment_ids, kv_segment_ids, q_starts):
    """The segment ids, both or neither."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; mla_prefill takes [batch, positions, heads, head size].")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating dtype.")
    B, T, H, J = q.shape
    S = k.shape[1]
    if k.shape != (B, S, H, J):
        raise ValueError(f"k has shape {k.shape}, q {q.shape}; batch, heads and head size must agree.")
    if v.shape[:3] != (B, S, H):
        raise ValueError(f"v has shape {v.shape}, k {k.shape}; all but the head size must agree.")
    if 0 in (B, T, H, J, S, v.shape[3]):
        raise ValueError(f"q has shape {q.shape}, k {k.shape}, v {v.shape}; none may be empty, so skip such a call.")
    if q_starts is None and T > S:
        raise ValueError(f"T={T} queries exceed S={S} keys; give q_starts, the key beside each first query.")
    if q_starts is not None and (q_starts.shape != (B,) or not jnp.issubdtype(q_starts.dtype, jnp.integer)):
        raise ValueError(f"q_starts is {q_starts.dtype}{q_starts.shape}; give one integer a sequence, ({B},).")
    if q_segment_ids is None and kv_segment_ids is None:
        return None, None
    if q_segment_ids is None or (kv_segment_ids is None and T != S):
        raise ValueError(
            f"Only one of the segment ids is given, with T={T}, S={S}; give q_segment_ids and kv_segment_ids."
        )
    kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
    for name, ids, shape in (("q", q_segment_ids, (B, T)), ("kv", kv_segment_ids, (B, S))):
        if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name}_segment_ids is {ids.dtype}{ids.shape}; give one integer a position, {shape}.")
    return q_segment_ids, kv_segment_ids
