"""The whole model: embedding, a stack of dense layers, a stack of MoE layers, norm, head, and the MTP modules."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.attention import attend_blocked
from dsv3_jax.model.block import Parts, dense_block, moe_block
from dsv3_jax.model.embedding import embed, unembed
from dsv3_jax.model.mla import Attend, Latents, mla
from dsv3_jax.model.moe.layer import Route, RoutedExperts, Routing, local_experts
from dsv3_jax.model.moe.router import route
from dsv3_jax.model.mtp import mtp
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.params import stack_bias
from dsv3_jax.model.rope import rope_table
from dsv3_jax.precision.policy import Policy, policy_of
from dsv3_jax.typing import AnyArray, Array, Float, Int, Variables

Remat = Literal["none", "paper", "full"]


class Output(NamedTuple):
    """What `forward` returns."""

    logits: Float[Array, "B T V"]
    mtp_logits: tuple[Float[Array, "B _ V"], ...]
    """One for each depth k = 1…, [B, T-k, V]; row i predicts token i+1+k."""
    router: Routing | None
    """One row for each MoE layer of the main model, in order; None without MoE layers."""


class Hidden(NamedTuple):
    """Everything before the head: what a loss needs."""

    hidden: Float[Array, "B T D"]
    """After the final norm; row t predicts token t+1."""
    mtp_hidden: Float[Array, "k B T D"] | None
    """Row t of depth k predicts token t+1+k; its last k rows are filler."""
    router: Routing | None
    mtp_load: Int[Array, "k E"] | None
    balance_loss: Float[Array, "l"]
    """One for each MoE layer, MTP modules last, without the factor α."""
    kept: tuple[Any, Any]
    """What `keep` kept of the latents, stacked over the dense and over the MoE layers."""


def forward(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    policy: Policy | None = None,
    attend: Attend = attend_blocked,
    route: Route = route,
    experts: RoutedExperts = local_experts,
) -> Output:
    """Logits of every position, of the main model and of each MTP depth.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}` from `init` or `load_pretrained`.
        tokens: ids in 0..V-1; ids outside read nothing sensible, so check them where they enter.
        positions: for rope; default 0..T-1.
        segment_ids: 0 for padding, 1.. for documents: a token sees only its own document, and padding counts in
            no expert load. Default: one document a row.
        policy: dtypes of the arithmetic; default: the dtype that the parameters have.
        attend, route, experts: the functions to replace when changing an equation.

    Materialises [B, T, V] float32; training goes through `hidden_states` and a chunked loss.
    """
    policy = policy or _policy_of(variables)
    states = hidden_states(
        cfg, variables, tokens, positions, segment_ids, policy=policy, attend=attend, route=route, experts=experts
    )
    head, T = variables["params"]["unembed"], tokens.shape[1]
    mtp_logits = tuple(
        unembed(head, states.mtp_hidden[k - 1, :, : max(T - k, 0)], policy=policy)
        for k in range(1, cfg.mtp_depth + 1)
        if states.mtp_hidden is not None
    )
    return Output(unembed(head, states.hidden, policy=policy), mtp_logits, states.router)


def hidden_states(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    policy: Policy | None = None,
    remat: Remat = "none",
    attend: Attend = attend_blocked,
    route: Route = route,
    experts: RoutedExperts = local_experts,
    keep: Callable[[Latents], Any] = lambda latents: None,
    with_mtp: bool = True,
) -> Hidden:
    """Runs the model up to the head. Arguments as in `forward`.

    `remat`: what backward recomputes: "none" nothing, "paper" norms, MLA up-projections, the SwiGLU product
    (report section 3.2.3) and attention, "full" whole layers. `keep` says what of each layer's latents is returned
    in `kept`.
    """
    params, router_state = variables["params"], variables.get("router_state", {})
    tokens = jnp.asarray(tokens)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    parts = Parts(policy or _policy_of(variables), attend, route, experts)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    rope = rope_table(jnp.asarray(positions), rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)
    valid = None if segment_ids is None else segment_ids > 0

    def mix(mla_params, normed):
        added, latents = mla(mla_params, normed, rope, segment_ids, cfg=cfg, policy=parts.policy, attend=parts.attend)
        return added, keep(latents)

    def dense_step(x, layer):
        return dense_block(layer, x, mix, cfg=cfg, parts=parts)

    def moe_step(x, layer):
        layer_params, bias = layer
        x, kept, routing, balance = moe_block(layer_params, bias, x, valid, mix, cfg=cfg, parts=parts)
        return x, (kept, routing, balance)

    x = embed(params["embed"], tokens, policy=parts.policy)
    kept_dense = kept_moe = routing = None
    balance_losses = []
    if cfg.num_dense_layers:
        x, kept_dense = jax.lax.scan(rematerialised(dense_step, remat), x, params["dense_layers"])
    if cfg.num_moe_layers:
        stack = (params["moe_layers"], stack_bias(router_state, "moe_layers"))
        x, (kept_moe, routing, balance) = jax.lax.scan(rematerialised(moe_step, remat), x, stack)
        balance_losses.append(balance)
    hidden = rms_norm(x, params["final_norm"]["scale"], eps=cfg.norm_eps)

    mtp_hidden = mtp_load = None
    if cfg.mtp_depth and with_mtp:
        out = mtp(
            params["mtp"],
            stack_bias(router_state, "mtp"),
            params["embed"],
            hidden,
            tokens,
            segment_ids,
            rope,
            cfg=cfg,
            parts=parts,
            remat=lambda step: rematerialised(step, remat),
        )
        mtp_hidden, mtp_load = out.hidden, out.load
        balance_losses.append(out.balance_loss)
    balance_loss = jnp.concatenate(balance_losses) if balance_losses else jnp.zeros(0, jnp.float32)
    return Hidden(hidden, mtp_hidden, routing, mtp_load, balance_loss, (kept_dense, kept_moe))


def rematerialised(step: Callable, remat: Remat) -> Callable:
    """`step` of a scan over layers, with what its backward pass recomputes chosen by `remat`.

    "paper" saves exactly what `checkpoint_name` gives these names: what comes out of a large multiplication, but not
    MLA's up-projections. Naming what to save is the only way: a policy that names what not to save saves its input.
    """
    check(remat in ("none", "paper", "full"), f"remat={remat!r} is unknown; use 'none', 'paper' or 'full'.")
    if remat == "none":
        return step
    kept = jax.checkpoint_policies.save_only_these_names("kept", "mla_attended", "ffn_gate_up", "experts_gate_up")
    return jax.checkpoint(step, prevent_cse=False, policy=kept if remat == "paper" else None)


def _policy_of(variables: Variables) -> Policy:
    return policy_of(variables["params"]["embed"]["w"].dtype)
