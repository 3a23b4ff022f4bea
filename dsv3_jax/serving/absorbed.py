"""MLA in the absorbed form: heads read latents as decoding does; the twin of `model.mla.attend_expanded`."""

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.mla import Queries
from dsv3_jax.model.rope import softmax_scale
from dsv3_jax.typing import Array, Float, Int, Params


def absorb(params: Params, *, cfg: ModelConfig) -> dict[str, Array]:
    """Splits W^UK from W^UV, both transposed as decoding multiplies them: `k_up` [H, I, C], `v_up` [H, C, W].

    Done once for many steps, on one layer or on a stack: transposing costs as much as the attention of a step.
    """
    k_up, v_up = jnp.split(params["kv_up"], [cfg.mla.nope_head_dim], axis=-1)
    rest = {name: leaf for name, leaf in params.items() if name != "kv_up"}
    return rest | {"k_up": jnp.moveaxis(k_up, -3, -1), "v_up": jnp.moveaxis(v_up, -2, -3)}


def into_latents(params: Params, q: Queries) -> Float[Array, "B T H X"]:
    """Absorbed form, before attention: W^UK goes into the query, so that heads read the latents themselves.

    [q^C·W^UK; q^R], as wide as a row of the cache; `params` come from `absorb`.
    """
    return jnp.concatenate([_by_head(q.nope, params["k_up"]), q.rope], axis=-1)


def out_of_latents(params: Params, out: Float[Array, "B T H C"]) -> Float[Array, "B T H W"]:
    """Absorbed form, behind attention: W^UV on what each head gathered of the latents."""
    return _by_head(out, params["v_up"])


def _by_head(x: Float[Array, "B T H A"], w: Float[Array, "H A Z"]) -> Float[Array, "B T H Z"]:
    """Each head's rows times its weights, the weights on the right: `jnp.einsum` puts them on the left, transposed."""
    out_HBTZ = jax.lax.dot_general(x, w.astype(x.dtype), (((3,), (1,)), ((2,), (0,))))
    return jnp.moveaxis(out_HBTZ, 0, 2)


def attend_absorbed(
    params: Params,
    q: Queries,
    cache: Float[Array, "B S X"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_starts: Int[Array, "B"],
    *,
    cfg: ModelConfig,
    functions: Functions,
) -> Float[Array, "B T H W"]:
    """Absorbed form over rows [c^KV; k^R] that hold the new tokens, too: one key and one value for all heads.

    Query t of a sequence stands beside row q_starts + t, and sees the rows of its segment up to there.
    """
    rows = cache[:, :, None, :]
    out_BTHC = functions.attend(
        into_latents(params, q),
        rows,
        rows[..., : cfg.mla.kv_latent_dim],
        q_segment_ids,
        kv_segment_ids,
        scale=softmax_scale(cfg.mla, cfg.yarn),
        q_starts=q_starts,
    )
    return out_of_latents(params, out_BTHC)
