"""The loop that runs a table of ticks inside `jax.shard_map`. It knows ticks, buffers and neighbours, and no model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel.axes import PIPE
from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.ticks import Sizes, Tick
from dsv3_jax.typing import Array, Int
from dsv3_kernels.varying import varying_axes, varying_over


class Work(NamedTuple):
    """A chunk."""

    stage: Int[Array, ""]
    place: int | Int[Array, ""]
    """Which of the rank's stages it is."""
    micro: Int[Array, ""]


class Passed(NamedTuple):
    """What a forward pass leaves."""

    x: Array
    """For the next stage."""
    stored: Any
    """What its backward pass needs."""
    ends: Any
    """What the last stage's backward pass needs beyond it."""


Forward = Callable[[Work, Array, Any], tuple[Passed, Any]]
"""forward(work, x, sums) -> what it leaves, sums."""
Backward = Callable[[Work, Any, Any, Array, Any], tuple[Array, Any]]
"""backward(work, stored, ends, gradient, sums) -> the gradient for the stage before, sums."""


def run(
    rows: Int[Array, "ticks columns"],
    bounds: Int[Array, "4"],
    *,
    forward: Forward,
    backward: Backward,
    forward_sums: Any,
    backward_sums: Any,
    x: Array,
    sizes: Sizes,
    placement: Placement,
) -> tuple[Any, Any]:
    """Both sums after all chunks of a table (see `ticks.Table`), whose rows are this rank's.

    `x` is like what stages send each other, in shape, dtype and the axes it varies over. Ticks before and after the
    steady run are one loop, in which an idle forward or backward is skipped: the ranks of one stage skip it together,
    so they may exchange something inside. In the steady run nothing is conditional, and places are static.
    """
    work = varying_over(Work(*[jnp.int32(0)] * 3), (PIPE,))
    like = jax.eval_shape(forward, work, x, forward_sums)
    buffers = Buffers(
        _slots(x, sizes.arrived),
        _slots(x, sizes.gradients),
        _slots(like[0].stored, sizes.stored),
        _slots(like[0].ends, sizes.ends),
    )
    ticks = _Ticks(rows, forward, backward, like, placement)

    def phase(index: Array, carry: Any) -> Any:
        """The ticks before the steady run, and it; then the ticks after, and nothing."""
        carry = lax.fori_loop(bounds[2 * index], bounds[2 * index + 1], ticks.any_tick, carry)
        if len(placement.flows) == 1:
            return carry
        num_pairs = jnp.where(index == 0, (bounds[2] - bounds[1]) // 2, 0)
        return lax.fori_loop(0, num_pairs, lambda pair, carry: ticks.two_ticks(bounds[1] + 2 * pair, carry), carry)

    _, forward_sums, backward_sums = lax.fori_loop(0, 2, phase, (buffers, forward_sums, backward_sums))
    return forward_sums, backward_sums


class Buffers(NamedTuple):
    """What waits in a rank's memory, each with a leading axis of slots."""

    arrived: Array
    gradients: Array
    stored: Any
    ends: Any


class _Ticks(NamedTuple):
    """The two kinds of tick."""

    rows: Array
    forward: Forward
    backward: Backward
    like: Any
    """Of what a forward returns."""
    placement: Placement

    def any_tick(self, now: Array, carry: Any) -> Any:
        """A forward and a backward, each of which may be idle."""
        tick, num_stages = Tick(*self.rows[now]), self.placement.num_stages
        (buffers, inputs), forward_sums, backward_sums = _opened(carry, tick)
        passed, forward_sums = lax.cond(
            tick.f_stage < num_stages,
            lambda x, sums: _typed(self.forward(Work(tick.f_stage, tick.f_place, tick.f_micro), x, sums), self.like),
            lambda x, sums: (_zeros(self.like[0]), sums),
            inputs.arrived,
            forward_sums,
        )
        gradient, backward_sums = lax.cond(
            tick.b_stage < num_stages,
            lambda inputs, sums: self._backward(tick, tick.b_place, inputs, sums),
            lambda inputs, sums: (inputs.gradients, sums),
            inputs,
            backward_sums,
        )
        buffers = _store(buffers, passed, tick)
        from_left, from_right = _exchanged(passed.x, gradient, self.placement)
        for arrives, x_slot, g_slot in (
            (from_left, tick.x_from_left, tick.g_from_left),
            (from_right, tick.x_from_right, tick.g_from_right),
        ):
            buffers = _receive(buffers, arrives, x_slot, g_slot)
        return buffers, forward_sums, backward_sums

    def two_ticks(self, now: Array, carry: Any) -> Any:
        """Two ticks of the steady run. All that a rank sends in one goes to the same neighbour, which answers."""
        rank, num_ranks = lax.axis_index(PIPE), self.placement.num_ranks
        for place in (0, 1):
            tick = Tick(*self.rows[now + place])
            (buffers, inputs), forward_sums, backward_sums = _opened(carry, tick)
            passed, forward_sums = self.forward(Work(tick.f_stage, place, tick.f_micro), inputs.arrived, forward_sums)
            gradient, backward_sums = self._backward(tick, 1 - place, inputs, backward_sums)
            buffers = _store(buffers, passed, tick)
            pairs = [(left, left + 1) for left in range(place, num_ranks - 1, 2)]
            sent = passed.x, gradient
            arrives = lax.ppermute(sent, PIPE, [*pairs, *((right, left) for left, right in pairs)])
            is_left = rank % 2 == place
            if self.placement.flows == (0, 0):
                arrives = _chosen(is_left & (rank == num_ranks - 1), sent, arrives)
            x_slot = jnp.where(is_left, tick.x_from_right, tick.x_from_left)
            g_slot = jnp.where(is_left, tick.g_from_right, tick.g_from_left)
            carry = _receive(buffers, arrives, x_slot, g_slot), forward_sums, backward_sums
        return carry

    def _backward(self, tick: Tick, place: int | Array, inputs: Buffers, sums: Any) -> Any:
        work = Work(tick.b_stage, place, tick.b_micro)
        return self.backward(work, inputs.stored, inputs.ends, inputs.gradients, sums)


def _opened(carry: Any, tick: Tick) -> Any:
    """The carry, its buffers beside what a tick reads of them. Reads come before writes, which are then in place."""
    buffers, *sums = carry
    slots = Buffers(tick.f_input, tick.b_gradient, tick.b_stored, tick.b_end)
    read = Buffers(*map(_read, buffers, slots))
    # Each by itself: old versions of jax type all results of a barrier as varying over the axes of any operand.
    pairs = map(lax.optimization_barrier, zip(jax.tree.leaves(buffers), jax.tree.leaves(read), strict=True))
    opened = tuple(jax.tree.unflatten(jax.tree.structure(buffers), leaves) for leaves in zip(*pairs, strict=True))
    return opened, *sums


def _store(buffers: Buffers, passed: Passed, tick: Tick) -> Buffers:
    stored = _write(buffers.stored, passed.stored, tick.f_stored)
    return buffers._replace(stored=stored, ends=_write(buffers.ends, passed.ends, tick.f_end))


def _receive(buffers: Buffers, arrives: tuple[Any, Any], x_slot: Array, g_slot: Array) -> Buffers:
    x, gradient = arrives
    if x is not None:
        buffers = buffers._replace(arrived=_write(buffers.arrived, x, x_slot))
    return buffers if gradient is None else buffers._replace(gradients=_write(buffers.gradients, gradient, g_slot))


def _exchanged(x: Array, gradient: Array, placement: Placement) -> tuple[Any, Any]:
    """(activation, gradient) that arrive from the rank before, and from the rank after; None where nothing ever does.

    With two stages a rank, chunks pass in both directions: a rank sends both to both neighbours, and who is not meant
    writes them to the slot that holds nothing. The last rank has itself as the rank after, for the turn of a V.
    """
    num_ranks = placement.num_ranks
    to_right = [(rank, rank + 1) for rank in range(num_ranks - 1)]
    to_left = [(rank + 1, rank) for rank in range(num_ranks - 1)]
    if len(placement.flows) == 1:
        return (lax.ppermute(x, PIPE, to_right), None), (None, lax.ppermute(gradient, PIPE, to_left))
    from_left, from_right = (lax.ppermute((x, gradient), PIPE, pairs) for pairs in (to_right, to_left))
    is_turn = lax.axis_index(PIPE) == num_ranks - 1
    return from_left, _chosen(is_turn, (x, gradient), from_right)


def _chosen(condition: Array, true: Any, false: Any) -> Any:
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), true, false)


def _slots(tree: Any, size: int) -> Any:
    """So many slots for a tree like this one."""

    def slots(leaf: Any) -> Array:
        return varying_over(jnp.zeros((size, *leaf.shape), leaf.dtype), varying_axes(leaf))

    return jax.tree.map(slots, tree)


def _read(buffer: Any, slot: Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, 0, keepdims=False), buffer)


def _write(buffer: Any, value: Any, slot: Array) -> Any:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, 0), buffer, value)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: varying_over(jnp.zeros(leaf.shape, leaf.dtype), varying_axes(leaf)), tree)


def _typed(tree: Any, like: Any) -> Any:
    """`tree` as varying over what `like` does."""
    return jax.tree.map(lambda leaf, other: varying_over(leaf, varying_axes(other)), tree, like)
