"""One optimizer step: loss, gradients over micro-batches, update, router bias.

A step over n micro-batches is exactly a step over their concatenation: every sum is divided by the count of the whole
batch, and the router's bias moves once, on the load of the whole batch. Both are sums inside the step, over whatever
devices the batch lies on.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.functions import Functions, functions_for
from dsv3_jax.model.transformer import Hidden, hidden_states
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.training.optimizer import (
    apply_update,
    make_optimizer,
    router_biases,
    update_bias,
    with_router_biases,
)
from dsv3_jax.training.state import TrainState
from dsv3_jax.typing import Array, Bool, Float, Int, Params


class Rates(NamedTuple):
    """The schedules' values for one step, float32 scalars: η, λ, γ."""

    learning_rate: Any
    mtp_weight: Any
    bias_speed: Any


class Denominators(NamedTuple):
    """What sums over a micro-batch are divided by so that those of all micro-batches add up to the batch's means."""

    labels: Float[Array, "d"]
    """Labels of each depth in the whole batch, at least 1."""
    micro_batches: Float[Array, ""]


class Terms(NamedTuple):
    """The terms of the loss, each already divided by its count, and what the routers did."""

    main: Float[Array, ""]
    mtp: Float[Array, "k"]
    balance: Float[Array, "l"]
    load: Int[Array, "l E"]
    """Tokens of each expert; MoE layers of the main model in order, then the MTP modules."""
    dropped: Int[Array, "l"]
    """Choices that no expert computed, for want of room."""


class StepReport(NamedTuple):
    """What a step learned, on the device until somebody reads it."""

    loss: Float[Array, ""]
    terms: Terms
    grad_norm: Float[Array, ""]
    bias_min: Float[Array, "l"]
    bias_max: Float[Array, "l"]
    is_finite: Bool[Array, ""]
    """False: loss or gradient was not finite, and the state is as before the step."""


class Sums(NamedTuple):
    """What micro-batches add up to: all that the update needs."""

    loss: Float[Array, ""]
    terms: Terms
    gradients: Params
    """Float32."""


Gradients = Callable[[TrainState, Batch, Denominators, Rates], Sums]


def batch_loss(
    params: Params,
    router_state: Params,
    batch: Batch,
    denominators: Denominators,
    mtp_weight: Float[Array, ""],
    *,
    cfg: RunConfig,
    functions: Functions | None = None,
    next_token_loss: Callable[..., Float[Array, ""]] = next_token_loss,
    of_layer: Callable[[Params], Params] = lambda params: params,
) -> tuple[Float[Array, ""], Terms]:
    """L = L_main + λ/D Σ_k L_k + α Σ_layers L_balance (report eq. 17-20, 24-25), one micro-batch's share of it.

    `functions` defaults to those that `cfg.precision` names; `of_layer` as in `hidden_states`.
    """
    train, variables = cfg.train, {"params": params, "router_state": router_state}
    functions = functions or functions_for(cfg.precision)
    places, settings = (batch.positions, batch.segment_ids), {"remat": train.remat, "of_layer": of_layer}
    states = hidden_states(cfg.model, variables, batch.tokens, *places, functions=functions, **settings)
    head = params["unembed"]["w"]

    def mean_loss(hidden: Float[Array, "B T D"], depth: int) -> Float[Array, ""]:
        labels, weights = batch.labels[depth], batch.weights[depth]
        with jax.named_scope("loss"):
            total = next_token_loss(hidden, head, labels, weights, chunk_size=train.loss_chunk_size)
            return total / denominators.labels[depth]

    main = mean_loss(states.hidden, 0)
    mtp_hidden = () if states.mtp_hidden is None else states.mtp_hidden
    mtp_losses = [mean_loss(hidden, depth) for depth, hidden in enumerate(mtp_hidden, 1)]
    mtp = jnp.stack(mtp_losses) if mtp_losses else jnp.zeros(0, jnp.float32)
    balance, load, dropped = _of_routers(states, num_experts=cfg.model.moe.num_experts)
    balance = balance / denominators.micro_batches
    loss = main + train.auxiliary.balance_weight * balance.sum()
    if cfg.model.mtp_depth:
        loss = loss + mtp_weight * mtp.mean()
    return loss, Terms(main, mtp, balance, load, dropped)


def denominators_of(batches: Batch) -> Denominators:
    """Of a whole batch: micro-batches stacked on a leading axis."""
    labels = (batches.weights != 0).sum(axis=(0, 2, 3), dtype=jnp.int32)
    return Denominators(jnp.maximum(labels, 1).astype(jnp.float32), jnp.float32(batches.tokens.shape[0]))


@dataclasses.dataclass(frozen=True)
class Step:
    """A step as a function of (state, stacked micro-batches, rates); each of its programs has jit's `.lower`.

    `fused` is the whole step over one micro-batch. For several: `denominators` and `zeros`, then `accumulate` for each,
    then `update`. `place` puts NumPy arrays where the programs read them.
    """

    fused: Any
    denominators: Any
    zeros: Any
    accumulate: Any
    update: Any
    place: Callable[[Batch], Batch] = lambda batches: batches

    def __call__(self, state: TrainState, batches: Batch, rates: Rates) -> tuple[TrainState, StepReport]:
        """The state after one step, and its report; `state` is consumed."""
        num = batches.tokens.shape[0]
        if num == 1:
            return self.fused(state, self.place(batches), rates)
        denominators = self.denominators(self.place(batches))
        sums = self.zeros(state, self.place(_micro_batch(batches, 0)), denominators, rates)
        for i in range(num):
            sums = self.accumulate(sums, state, self.place(_micro_batch(batches, i)), denominators, rates)
        return self.update(state, sums, rates)

    def compile(self, state: TrainState, batches: Batch, rates: Rates) -> None:
        """Compiles what a call with these arguments needs, and consumes nothing; the call then finds it."""
        if batches.tokens.shape[0] == 1:
            self.fused.lower(state, self.place(batches), rates).compile()
            return
        arguments = (state, self.place(_micro_batch(batches, 0)), self.denominators(self.place(batches)), rates)
        sums = self.zeros(*arguments)
        self.accumulate.lower(sums, *arguments).compile()
        self.update.lower(state, sums, rates).compile()


def make_step(
    cfg: RunConfig,
    loss: Callable[..., Any] = batch_loss,
    *,
    functions: Functions | None = None,
    gradients: Gradients | None = None,
    shardings: TrainState | None = None,
    place: Callable[[Batch], Batch] = lambda batches: batches,
) -> Step:
    """The compiled step of `cfg`; it consumes the state it is given (donated buffers).

    One micro-batch is one fused program; several are one program each, summed, and one for the update.

    Args:
        cfg: the run.
        loss: as `batch_loss`.
        functions: what a layer is made of; default: those that `cfg.precision` names.
        gradients: in place of autodiff of `loss`, such as a pipeline.
        shardings: of a `TrainState`, of the results of every program; without them XLA chooses where moments lie.
        place: of the `Step`.
    """
    gradients = gradients or partial(gradients_of, partial(loss, cfg=cfg, functions=functions))
    update = jax.named_scope("optimizer")(partial(apply_gradients, cfg=cfg))

    def fused(state: TrainState, batches: Batch, rates: Rates) -> tuple[TrainState, StepReport]:
        return update(state, gradients(state, _micro_batch(batches, 0), denominators_of(batches), rates), rates)

    def accumulate(sums: Sums, *arguments: Any) -> Sums:
        return jax.tree.map(jnp.add, sums, gradients(*arguments))

    def zeros(*arguments: Any) -> Sums:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, *arguments))

    free: Any = None
    sharded = None if shardings is None else (shardings, free)
    sharded_sums = None if shardings is None else Sums(free, free, shardings.params)
    return Step(
        jax.jit(fused, donate_argnums=0, out_shardings=sharded),
        jax.jit(denominators_of),
        jax.jit(zeros, out_shardings=sharded_sums),
        jax.jit(accumulate, donate_argnums=0, out_shardings=sharded_sums),
        jax.jit(update, donate_argnums=0, out_shardings=sharded),
        place,
    )


def gradients_of(
    loss: Callable[..., Any], state: TrainState, batch: Batch, denominators: Denominators, rates: Rates
) -> Sums:
    """By autodiff of `loss`, in float32."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, terms), grads = value_and_grad(state.params, state.router_state, batch, denominators, rates.mtp_weight)
    return Sums(value, terms, jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def apply_gradients(state: TrainState, sums: Sums, rates: Rates, *, cfg: RunConfig) -> tuple[TrainState, StepReport]:
    """AdamW on the parameters and ±γ on the router biases, or nothing where loss or gradient is not finite."""
    optimizer = make_optimizer(cfg.train.optimizer, cfg.model, moment_dtype=cfg.moment_dtype)
    grad_norm = optax.tree.norm(sums.gradients)
    is_finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    wide = jax.tree.map(lambda param: param.astype(jnp.float32), state.params)
    direction: Any
    direction, opt_state = optimizer.update(sums.gradients, state.opt_state, wide)
    params = apply_update(state.params, direction, rates.learning_rate)
    router_state = state.router_state
    if router_state:  # empty where routing has no bias
        biases = update_bias(router_biases(router_state), sums.terms.load, rates.bias_speed)
        router_state = with_router_biases(router_state, biases)
    new = TrainState(params, router_state, opt_state)
    new = jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), new, state)
    biases = router_biases(new.router_state)
    return new, StepReport(sums.loss, sums.terms, grad_norm, biases.min(axis=1), biases.max(axis=1), is_finite)


def _micro_batch(batches: Batch, index: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[index], batches)


def _of_routers(states: Hidden, *, num_experts: int) -> tuple[Array, Array, Array]:
    """Balance losses [l], loads [l, E] and dropped choices [l] of all routers; MTP modules last."""
    found = [routing for routing in (states.routing, states.mtp_routing) if routing is not None]
    if not found:
        return jnp.zeros(0, jnp.float32), jnp.zeros((0, num_experts), jnp.int32), jnp.zeros(0, jnp.int32)

    def joined(name: str) -> Array:
        return jnp.concatenate([getattr(routing, name) for routing in found])

    return joined("balance_loss"), joined("load"), joined("dropped")
