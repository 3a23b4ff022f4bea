"""The compiled programs that a runner calls: two kinds of steps, and what is computed from their outputs.

They belong to the module, keyed by static arguments: a second runner of the same shapes compiles nothing.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.parts import unembed
from dsv3_jax.serving.edits import Edits, edited, rows_of
from dsv3_jax.serving.paged_cache import PagedCache
from dsv3_jax.serving.paged_steps import Step, extends, paged_decode, paged_extend, paged_prefill
from dsv3_jax.serving.sampler import Sampling, TopLogprobs, sample, top_logprobs
from dsv3_jax.serving.steps import decoding_weights
from dsv3_jax.typing import Array, Float, Int, Params, Variables

PIECE = 128
"""Tokens of a chunk whose logits exist at once."""


class Tokens(NamedTuple):
    """What a step reads of its sequences."""

    ids: Int[Any, "B T"]
    counts: Int[Any, "B"]
    """How many of T are there; 0: an unused row."""
    lengths: Int[Any, "B"]
    """Tokens before them."""
    page_table: Int[Any, "B P"]


class Ran(NamedTuple):
    """What a step computed."""

    likeliest: Int[Array, "B"]
    """Of the logits, the lowest id among equals: nothing else runs for a greedy batch."""
    logits: Float[Array, "B V"]
    step: Step


in_steps = partial(jax.jit, static_argnames=("cfg", "functions"), donate_argnames="pages")


@in_steps
def run_rows(
    cfg: ModelConfig, variables: Variables, pages: Array, tokens: Tokens, *, functions: Functions
) -> tuple[Array, Ran]:
    """One token a row: of a sequence that decodes, or of a short tail, which has as many rows as tokens."""
    cache = PagedCache(pages, tokens.page_table, tokens.lengths)
    cache, step = paged_decode(cfg, variables, tokens.ids, tokens.counts, cache, functions=functions)
    logits = step.logits[:, 0]
    return cache.pages, Ran(sample(logits, tokens.lengths, None), logits, step)


@in_steps
def run_chunk(
    cfg: ModelConfig, variables: Variables, pages: Array, tokens: Tokens, *, functions: Functions
) -> tuple[Array, Ran]:
    """A chunk of a prompt, in the cheaper form."""
    read = paged_extend if extends(cfg, tokens.ids.shape[1]) else paged_prefill
    cache = PagedCache(pages, tokens.page_table, tokens.lengths)
    cache, step = read(cfg, variables, tokens.ids, tokens.counts, cache, functions=functions)
    return cache.pages, Ran(sample(step.logits, tokens.lengths, None), step.logits, step)


@jax.jit
def draw_rows(
    logits: Float[Array, "B V"], positions: Int[Any, "B"], sampling: Sampling, table: Edits, slots: Int[Any, "B"]
) -> Int[Array, "B"]:
    """The tokens at `positions`, by logits that the rows of `table` at `slots` change, if any does."""
    neutral = len(table.counts) - 1
    logits = jax.lax.cond(
        (slots != neutral).any(), lambda: edited(logits, positions, rows_of(table, slots)), lambda: logits
    )
    return sample(logits, positions, sampling)


@partial(jax.jit, static_argnames="width")
def find_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"], *, width: int) -> TopLogprobs:
    """Of `tokens`, and of the `width` likeliest."""
    return top_logprobs(logits, tokens, width=width)


@partial(jax.jit, static_argnames=("functions", "width"))
def find_prompt_logprobs(
    head: Params, hidden: Float[Array, "1 T D"], tokens: Int[Any, "T"], *, functions: Functions, width: int
) -> TopLogprobs:
    """Of the token behind each of a chunk's, from the hidden states of the chunk."""

    def of_piece(piece: tuple[Array, Array]) -> TopLogprobs:
        hidden, token = piece
        return top_logprobs(unembed(head, hidden[None], functions=functions), token[None], width=width)

    found = jax.lax.map(of_piece, (hidden[0], tokens), batch_size=PIECE)
    return TopLogprobs(*(field[:, 0] for field in found))


@partial(jax.jit, static_argnames=("cfg", "functions"))
def prepare(cfg: ModelConfig, variables: Variables, *, functions: Functions) -> dict:
    """`variables` as steps read them."""
    return decoding_weights(cfg, variables, functions=functions)
