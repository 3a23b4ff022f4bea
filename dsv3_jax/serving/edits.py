"""Changes to a sequence's logits that its request asks for: penalties, biases, no end before so many tokens."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.typing import AnyArray, Array, Bool, Float, Int


class Edits(NamedTuple):
    """What changes the logits of B sequences, of a table's slots, or, without the first dimension, of one."""

    counts: Int[AnyArray, "B V"]
    """How often each token was generated."""
    in_prompt: Bool[AnyArray, "B V"]
    is_stop: Bool[AnyArray, "B V"]
    """Tokens that would end the sequence."""
    bias: Float[AnyArray, "B V"]
    repetition: Float[AnyArray, "B"]
    """Divides positive and multiplies negative logits of tokens in the prompt or generated; 1: nothing."""
    presence: Float[AnyArray, "B"]
    """Off the logit of every token that was generated."""
    frequency: Float[AnyArray, "B"]
    """Off the logit of a token for each time that it was generated."""
    may_stop_from: Int[AnyArray, "B"]
    """The first position in the sequence at which it may end."""


def edited(logits: Float[Array, "B V"], positions: Int[Array, "B"], edits: Edits) -> Float[Array, "B V"]:
    """The logits that choose the tokens at `positions`: repetition, frequency and presence penalty, then bias."""
    was_generated = edits.counts > 0
    repetition = jnp.where(was_generated | edits.in_prompt, edits.repetition[:, None], 1)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= edits.frequency[:, None] * edits.counts.astype(jnp.float32)
    logits -= jnp.where(was_generated, edits.presence[:, None], 0)
    largest = jnp.finfo(jnp.float32).max
    logits = jnp.clip(logits + edits.bias, -largest, largest)  # an infinity less another is NaN
    is_banned = edits.is_stop & (positions < edits.may_stop_from)[:, None]
    return jnp.where(is_banned, -jnp.inf, logits)


def empty_edits(num_slots: int, vocab_size: int) -> Edits:
    """A table of `num_slots` rows, and of one more, the last, that changes nothing and never changes."""
    num_rows = num_slots + 1

    def one_a_token(dtype):
        return jnp.zeros((num_rows, vocab_size), dtype)

    return Edits(
        counts=one_a_token(jnp.int32),
        in_prompt=one_a_token(bool),
        is_stop=one_a_token(bool),
        bias=one_a_token(jnp.float32),
        repetition=jnp.ones(num_rows, jnp.float32),
        presence=jnp.zeros(num_rows, jnp.float32),
        frequency=jnp.zeros(num_rows, jnp.float32),
        may_stop_from=jnp.zeros(num_rows, jnp.int32),
    )


def rows_of(table: Edits, slots: Int[AnyArray, "B"]) -> Edits:
    """The rows at `slots` of a table: what `sample` takes."""
    return jax.tree.map(lambda column: column[slots], table)


@partial(jax.jit, donate_argnames="table")
def set_row(table: Edits, slot: Int[AnyArray, ""], row: Edits) -> Edits:
    """The table with `row`, which has no first dimension, in a slot; written in place."""
    return jax.tree.map(lambda column, value: column.at[slot].set(value), table, row)


@partial(jax.jit, donate_argnames="table")
def count(table: Edits, slots: Int[AnyArray, "B"], tokens: Int[AnyArray, "B"]) -> Edits:
    """The table with one more of each sequence's token, none in the last row; written in place."""
    neutral = len(table.counts) - 1
    slots = jnp.where(slots == neutral, neutral + 1, slots)  # beyond the table, where nothing is written
    return table._replace(counts=jnp.asarray(table.counts).at[slots, tokens].add(1, mode="drop"))
