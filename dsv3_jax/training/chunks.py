"""A chunk of a pipeline, a micro-batch in one stage: what its forward pass stores, and its backward pass.

Both are `jax.vjp` of the same function of parameters and activation. Its result is a pytree: the forward pass stores
its arrays but for those it was given, such as parameters; the backward pass traces it again, puts what was stored in
the place of its own, and XLA deletes the forward pass that nobody reads. The loss runs in the backward pass of the last
stage, because the gradient of the head is made along with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.data.batch import Batch
from dsv3_jax.model.mla import Context
from dsv3_jax.model.mtp import shift, where_the_token_is
from dsv3_jax.model.parts import embed, rms_norm
from dsv3_jax.model.transformer import context
from dsv3_jax.parallel.axes import PIPE
from dsv3_jax.parallel.pipeline.runtime import Passed, Work
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.training.stages import Around, Stage
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels.varying import varying_axes, varying_over


class Weights(NamedTuple):
    """Parameters of one rank, or their gradients, with a leading axis of places in `slots`, not a tuple of them."""

    slots: Any
    """[place][slot] -> {"attention", "moe", …}."""
    ends: Any
    """embed, unembed, and the norms before the head, one for each depth: every rank has them."""


class Learned(NamedTuple):
    """What forward passes add up to, of each router; the last row is of slots that have none."""

    load: Int[Array, "l_plus_1 E"]
    balance: Float[Array, "l_plus_1"]
    dropped: Int[Array, "l_plus_1"]


class Gained(NamedTuple):
    """What backward passes add up to."""

    losses: Float[Array, "d"]
    """Of each depth, divided by its number of labels."""
    gradients: Weights


class Given(NamedTuple):
    """What both passes of a chunk begin with: made again in the second, not stored."""

    slots: Any
    norms: tuple[Float[Array, "D"], ...]
    embedded: tuple[Float[Array, "B T D"], ...]
    """Of the tokens ahead, for each MTP module."""
    around: Around
    micro: Batch
    ahead: tuple[Int[Array, "B T"], ...]
    """Tokens 1, 2, … positions ahead."""


class Chunks(NamedTuple):
    """All chunks of a step, on one device."""

    stage: Stage
    weights: Weights
    biases: Float[Array, "l_plus_1 E"] | None
    batches: Batch
    """Stacked."""
    labels: Float[Array, "d"]
    """Their numbers, by which losses are divided."""
    mtp_weight: Float[Array, ""]
    balance_weight: Float[Array, ""]
    """What a balance loss counts in the loss of the whole batch."""

    def forward(self, work: Work, x: Array, learned: Learned) -> tuple[Passed, Learned]:
        """For `runtime.run`."""
        given = self._given(work)
        table, tokens, functions = self.weights.ends["embed"], given.micro.tokens, self.stage.on_device
        x = self.stage.choose(work.stage == 0, lambda _: embed(table, tokens, functions=functions), lambda x: x, x)
        (states, balance), (load, dropped), pull = self._differentiated(x, given)
        stored = [leaf for leaf, is_given in _opened(pull, given) if not is_given]
        row = jnp.asarray(self.stage.layout.router)[work.stage]
        new = Learned(load, balance, dropped)
        return Passed(states[0], stored, states), jax.tree.map(lambda sums, each: sums.at[row].add(each), learned, new)

    def backward(self, work: Work, stored: Any, states: Any, d_x: Array, gained: Gained) -> tuple[Array, Gained]:
        """For `runtime.run`."""
        given = self._given(work)
        (_, balance), _, pull = self._differentiated(d_x, given)
        following = iter(stored)
        leaves = [leaf if is_given else next(following) for leaf, is_given in _opened(pull, given)]
        pull = jax.tree.unflatten(jax.tree.structure(pull), leaves)
        d_states, (losses, gradients) = self._head(given, states, d_x, gained)
        d_balance = varying_over(jnp.broadcast_to(self.balance_weight, balance.shape), varying_axes(balance))
        d_slots, d_norms, d_embedded, d_x = pull((d_states, d_balance))

        def plus(sums: Array, new: Array) -> Array:
            return sums.at[work.place].add(new.astype(jnp.float32))

        slots, norms = jax.tree.map(plus, gradients.slots, d_slots), _plus(gradients.ends["norms"], d_norms)
        table = self._looked_up(work.stage == 0, given.micro.tokens, d_x, gradients.ends["embed"])
        for tokens, d in zip(given.ahead, d_embedded, strict=True):
            table = self._looked_up(given.around.is_last, tokens, d, table)
        return d_x, Gained(losses, Weights(slots, {**gradients.ends, "norms": norms, "embed": table}))

    def _differentiated(self, x: Array, given: Given) -> tuple[Any, Any, Callable]:
        """What a stage returns, twice, and the pullback to slots, norms, embeddings and x."""

        def run(slots: Any, norms: Any, embedded: Any, x: Array) -> Any:
            return self.stage(slots, norms, embedded, x, given.around)

        results, pull, more = jax.vjp(run, *given[:3], x, has_aux=True)
        return results, more, pull

    def _given(self, work: Work) -> Given:
        stage, layout, ends = self.stage, self.stage.layout, self.weights.ends
        slots = self._slots(work.place)
        micro = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, work.micro, 0, keepdims=False), self.batches)
        kind, row = jnp.asarray(layout.kind)[work.stage], jnp.asarray(layout.router)[work.stage]
        each, is_last = range(layout.num_slots), work.stage == layout.num_stages - 1
        biases = tuple(None if self.biases is None else self.biases[row[slot]] for slot in each)
        ctx = context(stage.cfg.model, micro.tokens.shape, micro.positions, micro.segment_ids)
        contexts, embedded, ahead = [ctx] * (layout.num_slots - stage.depth), [], []
        tokens, segments = micro.tokens, micro.segment_ids
        for depth in range(1, stage.depth + 1):
            tokens, segments = shift(tokens), None if segments is None else shift(segments)
            there = where_the_token_is(ctx, segments, tokens.shape, jnp.int32(depth))
            contexts.append(_either(is_last, there, ctx))
            embedded.append(embed(ends["embed"], tokens, functions=stage.on_device))
            ahead.append(tokens)
        around = Around(tuple(kind[slot] for slot in each), biases, tuple(contexts), is_last)
        return Given(slots, ends["norms"], tuple(embedded), around, micro, tuple(ahead))

    def _slots(self, place: int | Array) -> Any:
        """Those of a place. A place that is known only at run time costs a copy."""
        places = self.weights.slots
        if isinstance(place, int) or len(places) == 1:
            return places[0 if len(places) == 1 else place]
        return lax.switch(place, [lambda own=own: own for own in places])

    def _head(self, given: Given, states: Any, d_x: Array, gained: Gained) -> tuple[Any, Gained]:
        """Gradients of a stage's states, and what the last stage's head adds to losses and gradients."""
        micro, ends = given.micro, self.weights.ends
        norm_eps, chunk_size = self.stage.cfg.model.norm_eps, self.stage.cfg.train.loss_chunk_size

        def loss(states: Any, norms: Any, head: Array) -> tuple[Array, Array]:
            each = []
            for depth, (x, norm) in enumerate(zip(states, norms, strict=True)):
                hidden, labels, weights = rms_norm(x, norm, eps=norm_eps), micro.labels[depth], micro.weights[depth]
                with jax.named_scope("loss"):
                    total = next_token_loss(hidden, head, labels, weights, chunk_size=chunk_size)
                    each.append(total / self.labels[depth])
            of_modules = self.mtp_weight * jnp.stack(each[1:]).mean() if each[1:] else 0.0
            return each[0] + of_modules, jnp.stack(each)

        def of_last(states: Any, losses: Array, sums: Any) -> Any:
            differentiate = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
            (d_states, *d_ends), new = differentiate(states, ends["norms"], ends["unembed"]["w"])
            return d_states, losses + new, _plus(sums, tuple(d_ends))

        def of_others(states: Any, losses: Array, sums: Any) -> Any:
            return (d_x, *[jnp.zeros_like(d_x)] * self.stage.depth), losses, sums

        losses, (slots, sums) = gained
        of_head = losses, (sums["norms"], sums["unembed"]["w"])
        found = self.stage.choose(given.around.is_last, of_last, of_others, states, *of_head)
        d_states, losses, (norms, head) = found
        return d_states, Gained(losses, Weights(slots, {**sums, "norms": norms, "unembed": {"w": head}}))

    def _looked_up(self, condition: Array, tokens: Array, d_embedded: Array, sums: Any) -> Any:
        """The gradient of the embedding, to which some stages add."""

        def add(sums: Any, d: Array) -> Any:
            return {"w": sums["w"].at[tokens].add(d.astype(jnp.float32))}

        return self.stage.choose(condition, add, lambda sums, _: sums, sums, d_embedded)


def _plus(sums: Any, new: Any) -> Any:
    return jax.tree.map(lambda total, each: total + each.astype(jnp.float32), sums, new)


def _opened(pull: Any, given: Given) -> list[tuple[Any, bool]]:
    """The arrays that a pullback holds, and whether each is one of `given`, or the same for all chunks."""
    known = {id(leaf) for leaf in jax.tree.leaves(given)}
    return [(leaf, id(leaf) in known or PIPE not in varying_axes(leaf)) for leaf in jax.tree.leaves(pull)]


def _either(condition: Array, module: Context, other: Context) -> Context:
    """The context of an MTP module, or another, of the same tokens."""
    assert module.valid is not None
    valid = module.valid | ~condition
    if other.segment_ids is None or other.valid is None or module.segment_ids is None:
        return Context(other.rope, None, valid)
    segment_ids = jnp.where(condition, module.segment_ids, other.segment_ids)
    return Context(other.rope, segment_ids, valid & (condition | other.valid))
