"""The sum of what several parts of the GPU found for one sequence, weighted by their log-sum-exps: the plain form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dsv3_kernels.decode_attention.planner import Plan


def combine(
    out: Float[Array, "B R C"],
    lse: Float32[Array, "B R"],
    part_out: Float32[Array, "Z R C"],
    part_lse: Float32[Array, "Z R"],
    plan: Plan,
) -> tuple[Float[Array, "B R C"], Float32[Array, "B R"]]:
    """Fills in the sequences that were split; `out` and `lse` hold those that were not.

    Parts i = 0, 1, ... of a sequence lie in slots 2 first_part + 1, 2 (first_part + 1), 2 (first_part + 2), ...; all
    others of the 2 G slots hold anything. Weights are exp(lse - the largest lse), so nothing overflows, and a part that
    sees no key (lse = -inf) weighs nothing. The kernel `pallas_combine` does the same with its additions in one order,
    which a GPU does not keep here.
    """
    B, Z = out.shape[0], part_out.shape[0]
    slots = jnp.arange(Z, dtype=jnp.int32)
    is_split = plan.num_splits > 1
    index = slots[None, :] // 2 - plan.first_part[:, None]
    is_first = (slots[None, :] % 2 == 1) & (index == 0)
    is_later = (slots[None, :] % 2 == 0) & (index > 0) & (index < plan.num_splits[:, None])
    belongs_BZ = is_split[:, None] & (is_first | is_later)
    is_used = belongs_BZ.any(0)
    owner = jnp.where(is_used, jnp.argmax(belongs_BZ, axis=0).astype(jnp.int32), B)  # B: dropped

    part_lse = jnp.where(is_used[:, None], part_lse, -jnp.inf)
    largest = jax.ops.segment_max(part_lse, owner, B)
    origin = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weight = jnp.exp(part_lse - origin.at[owner].get(mode="fill", fill_value=0.0))
    total = jax.ops.segment_sum(weight, owner, B)
    has_keys = total > 0
    divisor = jnp.where(has_keys, total, 1.0)
    share = weight / divisor.at[owner].get(mode="fill", fill_value=1.0)
    # Unused slots were never written: a NaN times a weight of zero would be NaN.
    part_out = jnp.where(is_used[:, None, None], part_out, 0.0)
    merged = jax.ops.segment_sum(part_out * share[:, :, None], owner, B)
    merged_lse = jnp.where(has_keys, origin + jnp.log(divisor), jnp.inf)
    return (
        jnp.where(is_split[:, None, None], merged.astype(out.dtype), out),
        jnp.where(is_split[:, None], merged_lse, lse),
    )
