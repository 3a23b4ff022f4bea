"""How the works of a plan become the padded arrays of a few programs."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.programs import Tokens
from dsv3_jax.serving.sequence import Sequence, StepPlan, Work
from dsv3_jax.serving.shapes import LONGEST_TAIL, Shapes
from dsv3_jax.typing import Int


class Item(NamedTuple):
    """What one row of a program computes: `count` tokens behind `start` of a work's sequence."""

    index: int
    """Of the work in `StepPlan.works`."""
    work: Work
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """It ends a work behind which a token is wanted."""
        return self.work.draws and self.start + self.count == self.work.start + self.work.count


class Batch(NamedTuple):
    """One launch of the decoding program or of the prefill program."""

    items: list[Item]
    tokens: Tokens
    is_chunk: bool

    @property
    def drawing(self) -> list[Sequence | None]:
        """The sequence of each row that draws."""
        of_items = [item.work.sequence if item.draws else None for item in self.items]
        return of_items + [None] * (len(self.tokens.counts) - len(of_items))

    @property
    def positions(self) -> Int[np.ndarray, "B"]:
        """Where the token behind each row's last one stands in its sequence."""
        return self.tokens.lengths + self.tokens.counts

    @property
    def following(self) -> Int[np.ndarray, "T"]:
        """The token behind each of a chunk's, as far as there are any."""
        (item,) = self.items
        following = np.zeros(self.tokens.ids.shape[1], np.int32)
        known = item.work.sequence.tokens[item.start + 1 : item.start + item.count + 1]
        following[: len(known)] = known
        return following


def batches_of(plan: StepPlan, shapes: Shapes) -> list[Batch]:
    """Chunks, alone or a few short ones together, then decoding sequences and short tails as rows, a token each.

    A tail's rows are in order, behind the chunk that they continue: what one launch reads, another has written before.
    """
    rows = [Item(index, work, work.start, work.count) for index, work in enumerate(plan.decodes)]
    chunks: list[Item] = []
    for index, work in enumerate(plan.chunks, len(plan.decodes)):
        in_chunk = _count_in_chunk(work, shapes)
        if in_chunk:
            chunks.append(Item(index, work, work.start, in_chunk))
        rows += [Item(index, work, work.start + i, 1) for i in range(in_chunk, work.count)]
    launches = []
    for items in _packed(chunks, shapes):
        if shapes.packed is not None and len(items) > 1:
            empty = empty_batch(*shapes.packed, shapes.table_width)
        else:
            empty = empty_batch(1, *shapes.chunk_for(items[0].start, items[0].count))
        launches.append(_filled(items, empty, is_chunk=True))
    for items in _split(rows, shapes.rows[-1]):
        empty = empty_batch(shapes.rows_for(len(items)), 1, shapes.table_width)
        launches.append(_filled(items, empty, is_chunk=False))
    return launches


def _packed(chunks: list[Item], shapes: Shapes) -> list[list[Item]]:
    """Groups of short chunks that are cheaper together, and the others alone."""
    if shapes.packed is None:
        return [[item] for item in chunks]
    most, size = shapes.packed
    is_short = [size // 2 < item.count <= size and not asks_prompt_logprobs(item.work) for item in chunks]
    groups = [[item] for item, short in zip(chunks, is_short, strict=True) if not short]
    for some in _split([item for item, short in zip(chunks, is_short, strict=True) if short], most):
        groups += [some] if len(some) > most // 2 else [[item] for item in some]
    return groups


def _count_in_chunk(work: Work, shapes: Shapes) -> int:
    """How many of a work's tokens the program for chunks computes; the rest are rows of the decoding program."""
    if shapes.batch_invariant:
        return min(max(len(work.sequence.prompt) - work.start, 0), work.count)
    return 0 if work.count <= LONGEST_TAIL and not asks_prompt_logprobs(work) else work.count


def asks_prompt_logprobs(work: Work) -> bool:
    """It reads prompt tokens whose log-probabilities are wanted."""
    return work.sequence.params.prompt_logprobs is not None and work.start + 1 < len(work.sequence.prompt)


def _split(rows: list[Item], size: int) -> Iterator[list[Item]]:
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


def _filled(items: list[Item], empty: Tokens, *, is_chunk: bool) -> Batch:
    """The items in the first rows of `empty`, whose arrays are written."""
    for row, (_, work, start, count) in enumerate(items):
        pages = work.sequence.pages[: -(-(start + count) // PAGE_SIZE)]
        empty.ids[row, :count] = work.sequence.tokens[start : start + count]
        empty.counts[row], empty.lengths[row] = count, start
        empty.page_table[row, : len(pages)] = pages
    return Batch(items, empty, is_chunk)


def empty_batch(num_rows: int, num_tokens: int, table_width: int) -> Tokens:
    """Rows without tokens and pages."""
    return Tokens(
        np.zeros((num_rows, num_tokens), np.int32),
        np.zeros(num_rows, np.int32),
        np.zeros(num_rows, np.int32),
        np.full((num_rows, table_width), -1, np.int32),
    )
