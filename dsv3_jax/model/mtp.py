"""Multi-token prediction: sequential modules that share the main model's embedding and head (report section 2.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.block import Parts, moe_block
from dsv3_jax.model.embedding import embed
from dsv3_jax.model.mla import mla
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import RopeTable
from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Bool, Float, Int, Params


class MTPOutput(NamedTuple):
    """One leading row for each depth k = 1…; row t of depth k predicts token t+1+k. The last k rows are filler."""

    hidden: Float[Array, "k B T D"]
    load: Int[Array, "k E"]
    balance_loss: Float[Array, "k"]


def join(
    params: Params,
    embedded: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    *,
    cfg: ModelConfig,
    policy: Policy,
) -> Float[Array, "B T D"]:
    """h' = M_k·[RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)] (eq. 21).

    The report writes the hidden state first; the released weights have the embedding first, and so have we.
    """
    parts = [
        rms_norm(embedded, params["embed_norm"]["scale"], eps=cfg.norm_eps),
        rms_norm(hidden, params["hidden_norm"]["scale"], eps=cfg.norm_eps),
    ]
    return policy.plain_linear(jnp.concatenate(parts, axis=-1), params["proj"]["w"])


def mtp(
    params: Params,
    router_bias: Float[Array, "k E"] | None,
    embedding: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    rope: RopeTable,
    *,
    cfg: ModelConfig,
    parts: Parts,
    remat: Callable,
) -> MTPOutput:
    """Runs every depth in turn (eq. 21-23); the result goes through the shared head.

    `hidden` is the main model's state after its final norm, as in the released weights; depth k+1 likewise takes
    depth k's state after its own norm. A row whose token t+k lies in another document, or past the end, becomes
    padding: it attends to nothing of use and counts in no load.
    """
    T = tokens.shape[1]

    def mix_with(segments):
        def mix(mla_params, normed):
            added, _ = mla(mla_params, normed, rope, segments, cfg=cfg, policy=parts.policy, attend=parts.attend)
            return added, None

        return mix

    def one_depth(carry, module):
        hidden, next_tokens, next_segments, depth = carry
        module_params, bias = module
        next_tokens = _shift(next_tokens)
        valid: Bool[Array, "B T"] = jnp.broadcast_to(jnp.arange(T)[None, :] < T - depth, tokens.shape)
        segments = None
        if segment_ids is not None:
            next_segments = _shift(next_segments)
            segments = jnp.where(next_segments == segment_ids, segment_ids, 0)
            valid = valid & (segments > 0)
        x = join(
            module_params, embed(embedding, next_tokens, policy=parts.policy), hidden, cfg=cfg, policy=parts.policy
        )
        x = checkpoint_name(x, "kept")
        x, _, routing, balance = moe_block(
            module_params["block"], bias, x, valid, mix_with(segments), cfg=cfg, parts=parts
        )
        hidden = rms_norm(x, module_params["norm"]["scale"], eps=cfg.norm_eps)
        return (hidden, next_tokens, next_segments, depth + 1), MTPOutput(hidden, routing.load, balance)

    start = (hidden, tokens, segment_ids, jnp.int32(1))
    return jax.lax.scan(remat(one_depth), start, (params, router_bias))[1]


def _shift(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each row's ids one to the left, 0 at the end."""
    return jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
