"""The few shapes that an engine's steps are compiled for."""

import dataclasses

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig
from dsv3_jax.serving.paged_steps import extends

LONGEST_TAIL = 8
"""Tokens of a chunk that join the decoding sequences, as a row each, which costs less than a program of their own."""
SHORTEST_CHUNK, MOST_CHUNKS = 16, 6
PACKED = 4
"""Short chunks that one program reads: four of a quarter of the longest."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step is padded to: lengths are data, these are not."""

    num_pages: int
    """Of the pool."""
    max_num_batched_tokens: int
    rows: tuple[int, ...]
    """Of the decoding program, ascending: one row a token."""
    chunks: tuple[tuple[int, int], ...]
    """(tokens, pages of the table) of the programs for chunks, the cheapest first."""
    table_width: int
    """Pages of the longest sequence."""
    packed: tuple[int, int] | None
    """(sequences, tokens of each) of the program for several short chunks at once, if there is one."""
    batch_invariant: bool
    """A prompt's tokens go through the one program for chunks, generated ones through the one for decoding."""

    @property
    def drawn(self) -> tuple[int, ...]:
        """Rows that the sampler draws for: those of the decoding program, and the one of a chunk."""
        return tuple(sorted({1, *self.rows}))

    @property
    def chunk_batches(self) -> list[tuple[int, int, int]]:
        """(sequences, tokens, pages) of every program for chunks."""
        alone = [(1, tokens, pages) for tokens, pages in self.chunks]
        return alone if self.packed is None else [*alone, (*self.packed, self.table_width)]

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
        return Shapes(num_pages, budget, (serving.max_num_seqs,), ((most, width),), width, None, True)
    quarter = most // PACKED
    is_packed = quarter >= SHORTEST_CHUNK and serving.max_num_seqs >= PACKED and extends(cfg, quarter)
    packed = (PACKED, quarter) if is_packed else None
    return Shapes(num_pages, budget, _rows(serving.max_num_seqs), _chunks(cfg, most, width), width, packed, False)


def _rows(max_num_seqs: int) -> tuple[int, ...]:
    """Powers of two below what is needed at most, which is no less than a tail."""
    most = max(max_num_seqs, LONGEST_TAIL)
    return (*(1 << octave for octave in range((most - 1).bit_length())), most)


def _chunks(cfg: ModelConfig, most: int, width: int) -> tuple[tuple[int, int], ...]:
    """Sizes from `most` down: by halves where cost follows length, else by quarters with tables of two widths."""
    chunks, size = [], most
    while size >= SHORTEST_CHUNK or not chunks:
        is_absorbed = extends(cfg, size)
        widths = {max(-(-width // part), -(-size // PAGE_SIZE)) for part in ((1,) if is_absorbed else (1, 8))}
        if len(chunks) + len(widths) > MOST_CHUNKS:
            break
        chunks += [(size, pages) for pages in widths]
        size = -(-size // (2 if is_absorbed else 4))
    return tuple(sorted(chunks))
