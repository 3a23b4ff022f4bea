"""The few shapes that an engine's steps are compiled for."""

import dataclasses

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig

LONGEST_TAIL = 16
"""Tokens of a chunk that are cheaper as rows of the decoding program: no row expands what lies before it."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step is padded to: lengths are data, these are not."""

    num_pages: int
    """Of the pool."""
    max_num_batched_tokens: int
    rows: tuple[int, ...]
    """Of the decoding program, ascending: one row a token."""
    chunks: tuple[tuple[int, int], ...]
    """(tokens, pages of the table) of the prefill program, the cheapest first."""
    table_width: int
    """Pages of the longest sequence."""
    longest_tail: int
    """A chunk of so many tokens goes through the decoding program."""

    def rows_for(self, count: int) -> int:
        """The fewest rows that hold `count` of them."""
        return next(size for size in self.rows if size >= count)

    def chunk_for(self, start: int, count: int) -> tuple[int, int]:
        """The cheapest chunk for `count` tokens behind `start` of a sequence."""
        return next(
            (tokens, pages) for tokens, pages in self.chunks if tokens >= count and pages * PAGE_SIZE >= start + count
        )


def shapes_of(cfg: ModelConfig, serving: ServingConfig, *, on_cpu: bool) -> Shapes:
    """The shapes of an engine, and the defaults that depend on model and device."""
    longest = -(-cfg.max_position // PAGE_SIZE)
    num_pages = serving.num_pages or serving.max_num_seqs * min(longest, 2048 // PAGE_SIZE)
    budget = serving.max_num_batched_tokens or max(128 if on_cpu else 2048, serving.max_num_seqs)
    width = min(longest, num_pages)
    most = min(budget, width * PAGE_SIZE)
    check(
        budget >= serving.max_num_seqs,
        f"max_num_batched_tokens={budget} is less than max_num_seqs={serving.max_num_seqs} (ServingConfig).",
    )
    if serving.batch_invariant:
        return Shapes(num_pages, budget, (serving.max_num_seqs,), ((most, width),), width, 0)
    sizes = {most, max(-(-most // 4), min(most, 2 * LONGEST_TAIL))}
    widths = {max(-(-width // part), -(-most // PAGE_SIZE)) for part in (1, 4, 16)}
    chunks = sorted(((size, pages) for size in sizes for pages in widths), key=lambda shape: chunk_cost(cfg, *shape))
    return Shapes(num_pages, budget, _row_sizes(serving.max_num_seqs), tuple(chunks), width, min(LONGEST_TAIL, most))


def chunk_cost(cfg: ModelConfig, num_tokens: int, num_pages: int) -> int:
    """Multiplications of a chunk's attention in one layer, and about those of its projections."""
    mla, num_keys = cfg.mla, num_pages * PAGE_SIZE
    expanded = mla.kv_latent_dim * mla.num_heads * (mla.nope_head_dim + mla.v_head_dim)
    attended = num_tokens * mla.num_heads * (mla.qk_head_dim + mla.v_head_dim)
    return num_keys * (expanded + attended) + num_tokens * 12 * cfg.model_dim**2


def _row_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Powers of two below what is needed at most, which is no less than a tail."""
    most = max(max_num_seqs, LONGEST_TAIL)
    return (*(1 << octave for octave in range((most - 1).bit_length())), most)
