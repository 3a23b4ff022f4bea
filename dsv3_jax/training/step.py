"""One optimizer step: loss, gradients over micro-batches, update, router bias.

A step over n micro-batches is exactly a step over their concatenation: every sum is divided by the count of the whole
batch, known beforehand (`label_counts`), and the router's bias moves once, on the load of the whole batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.moe.router import update_bias
from dsv3_jax.model.params import router_biases, with_router_biases
from dsv3_jax.model.transformer import Hidden, hidden_states
from dsv3_jax.precision.policy import Policy, get_policy
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.training.optimizer import apply_update, make_optimizer
from dsv3_jax.training.state import TrainState
from dsv3_jax.typing import Array, Bool, Float, Int, Params


class Rates(NamedTuple):
    """The schedules' values for one step, float32 scalars: η, λ, γ."""

    learning_rate: Any
    mtp_weight: Any
    bias_speed: Any


class Parts(NamedTuple):
    """The terms of the loss, each already divided by its count, and the expert load."""

    main: Float[Array, ""]
    mtp: Float[Array, "k"]
    balance: Float[Array, "l"]
    load: Int[Array, "l E"]
    """Tokens of each expert; MoE layers of the main model in order, then the MTP modules."""


class StepReport(NamedTuple):
    """What a step learned, on the device until somebody reads it."""

    loss: Float[Array, ""]
    parts: Parts
    grad_norm: Float[Array, ""]
    bias_min: Float[Array, "l"]
    bias_max: Float[Array, "l"]
    is_finite: Bool[Array, ""]
    """False: loss or gradient was not finite, and the state is as before the step."""


def batch_loss(
    params: Params,
    router_state: Params,
    batch: Batch,
    counts: Float[Array, "d"],
    share: Float[Array, ""],
    mtp_weight: Float[Array, ""],
    *,
    cfg: RunConfig,
    policy: Policy | None = None,
    next_token_loss: Callable[..., Float[Array, ""]] = next_token_loss,
) -> tuple[Float[Array, ""], Parts]:
    """L = L_main + λ/D Σ_k L_k + α Σ_layers L_balance (report eq. 17-20, 24-25), this micro-batch's share of it.

    `counts` are the labels of the whole batch for each depth, `share` this micro-batch's share of its sequences.
    `policy` defaults to the one that `cfg.precision` names.
    """
    train = cfg.train
    states = hidden_states(
        cfg.model,
        {"params": params, "router_state": router_state},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        policy=policy or get_policy(cfg.precision),
        remat=train.remat,
    )
    head = params["unembed"]["w"]

    def mean_loss(hidden: Float[Array, "B T D"], depth: int) -> Float[Array, ""]:
        total = next_token_loss(
            hidden, head, batch.labels[depth], batch.weights[depth], chunk_size=train.loss_chunk_size
        )
        return total / counts[depth]

    main = mean_loss(states.hidden, 0)
    mtp_hidden = () if states.mtp_hidden is None else states.mtp_hidden
    mtp_losses = [mean_loss(hidden, depth) for depth, hidden in enumerate(mtp_hidden, 1)]
    mtp = jnp.stack(mtp_losses) if mtp_losses else jnp.zeros(0, jnp.float32)
    balance = share * states.balance_loss
    loss = main + train.auxiliary.balance_weight * balance.sum()
    if cfg.model.mtp_depth:
        loss = loss + mtp_weight * mtp.mean()
    return loss, Parts(main, mtp, balance, _load(cfg, states))


def make_step(cfg: RunConfig, loss: Callable[..., Any] = batch_loss) -> "Step":
    """The compiled step of `cfg`; it consumes the state it is given (donated buffers).

    One micro-batch is one fused program; several are one program each, summed, and one for the update.
    """
    optimizer = make_optimizer(cfg.train.optimizer, cfg.model, moment_dtype=cfg.moment_dtype)
    value_and_grad = jax.value_and_grad(partial(loss, cfg=cfg), has_aux=True)

    def gradients(state: TrainState, batch: Batch, counts: Array, share: Array, rates: Rates) -> Any:
        (value, parts), grads = value_and_grad(state.params, state.router_state, batch, counts, share, rates.mtp_weight)
        return value, parts, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def update(state: TrainState, summed: Any, rates: Rates) -> tuple[TrainState, StepReport]:
        value, parts, grads = summed
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        wide = jax.tree.map(lambda param: param.astype(jnp.float32), state.params)
        direction: Any
        direction, opt_state = optimizer.update(grads, state.opt_state, wide)
        router_state = state.router_state
        if router_state:
            biases = update_bias(router_biases(router_state), parts.load, rates.bias_speed)
            router_state = with_router_biases(router_state, biases)
        new = TrainState(
            apply_update(state.params, direction, rates.learning_rate),
            router_state,
            opt_state,
            state.key,
        )
        new = jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), new, state)
        biases = router_biases(new.router_state)
        report = StepReport(value, parts, grad_norm, biases.min(axis=1), biases.max(axis=1), is_finite)
        return new, report

    def fused(state: TrainState, batch: Batch, counts: Array, share: Array, rates: Rates) -> Any:
        return update(state, gradients(state, batch, counts, share, rates), rates)

    def accumulate(summed: Any, state: TrainState, batch: Batch, counts: Array, share: Array, rates: Rates) -> Any:
        return jax.tree.map(jnp.add, summed, gradients(state, batch, counts, share, rates))

    def zeros(state: TrainState, batch: Batch, counts: Array, share: Array, rates: Rates) -> Any:
        shapes = jax.eval_shape(gradients, state, batch, counts, share, rates)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    consuming = partial(jax.jit, donate_argnums=0)
    return Step(consuming(fused), jax.jit(zeros), consuming(accumulate), consuming(update))


@dataclasses.dataclass(frozen=True)
class Step:
    """A step as a function of (state, micro-batches, rates), and its programs, which `compile` can make beforehand."""

    _fused: Any
    _zeros: Any
    _accumulate: Any
    _update: Any

    def __call__(self, state: TrainState, batches: Batch, rates: Rates) -> tuple[TrainState, StepReport]:
        """The state after one step on stacked micro-batches, and its report; `state` is consumed."""
        counts, share = _denominators(batches)
        first, *others = _unstacked(batches)
        if not others:
            return self._fused(state, first, counts, share, rates)
        summed = self._zeros(state, first, counts, share, rates)
        for batch in (first, *others):
            summed = self._accumulate(summed, state, batch, counts, share, rates)
        return self._update(state, summed, rates)

    def compile(self, state: TrainState, batches: Batch, rates: Rates) -> None:
        """Compiles what a call with these arguments needs, and consumes nothing; the call then finds it."""
        first, *others = _unstacked(batches)
        arguments = (state, first, *_denominators(batches), rates)
        if not others:
            self._fused.lower(*arguments).compile()
            return
        summed = self._zeros(*arguments)
        self._accumulate.lower(summed, *arguments).compile()
        self._update.lower(state, summed, rates).compile()


def _denominators(batches: Batch) -> tuple[Float[np.ndarray, "d"], np.float32]:
    """Labels of each depth in the whole batch, and each micro-batch's share of its sequences."""
    return label_counts(batches), np.float32(1 / len(batches.tokens))


def label_counts(batches: Batch) -> Float[np.ndarray, "d"]:
    """Labels of each depth in all micro-batches, at least 1: what the sums of losses are divided by."""
    return np.maximum(np.count_nonzero(batches.weights, axis=(0, 2, 3)), 1).astype(np.float32)


def _unstacked(batches: Batch) -> list[Batch]:
    return [jax.tree.map(lambda array, i=i: array[i], batches) for i in range(len(batches.tokens))]


def _load(cfg: RunConfig, states: Hidden) -> Int[Array, "l E"]:
    loads = [states.router.load] if states.router is not None else []
    loads += [states.mtp_load] if states.mtp_load is not None else []
    return jnp.concatenate(loads) if loads else jnp.zeros((0, cfg.model.moe.num_experts), jnp.int32)
