"""The sum of what several parts of the GPU found for one sequence, weighted by their log-sum-exps, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def combine(
    out: Float[Array, "B R C"],
    lse: Float32[Array, "B R"],
    part_out: Float32[Array, "Z R C"],
    part_lse: Float32[Array, "Z R"],
    parts: Int32[Array, "G 5"],
) -> tuple[Float[Array, "B R C"], Float32[Array, "B R"]]:
    """Fills in the sequences that were split; `out` and `lse` hold those that were not.

    A split sequence has slot 2 g + 1 of the part g where it begins and slot 2 g of each later part; all others of the
    2 G slots hold anything. Weights are exp(lse - the largest lse), so nothing overflows, and a part that
    sees no key (lse = -inf) weighs nothing. The kernel `pallas_combine` does the same with its additions in one order,
    which a GPU does not leave here.
    """
    B = out.shape[0]
    first_seq, first_block, last_seq, _, num_splits = parts.T
    owner_of_later = jnp.where(first_block > 0, first_seq, B)  # B: dropped
    owner_of_first = jnp.where(num_splits > 1, last_seq, B)
    owner = jnp.stack([owner_of_later, owner_of_first], axis=1).reshape(-1)
    is_used = owner < B
    is_split = (owner[None, :] == jnp.arange(B, dtype=jnp.int32)[:, None]).any(1)

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
