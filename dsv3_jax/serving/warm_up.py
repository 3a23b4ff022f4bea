"""Compilation of every program of a runner before the first request."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.serving import programs
from dsv3_jax.serving.batches import empty_batch
from dsv3_jax.serving.edit_slots import last_row
from dsv3_jax.serving.edits import Edits, count, set_row
from dsv3_jax.serving.request_rows import sampling_rows
from dsv3_jax.serving.shapes import Shapes
from dsv3_jax.typing import Array

COMPILED_AT_ONCE = 2
"""XLA compiles without Python's lock, so two programs keep two cores busy."""


class Program(NamedTuple):
    """One to be compiled."""

    name: str
    function: Any
    """With all but its arrays bound."""
    arguments: tuple[Any, ...]
    """Arrays, or what stands for them."""

    def compile(self) -> jax.stages.Compiled:
        """So that calls with arrays of these shapes find it."""
        settings = self.function.keywords
        return self.function.func.lower(*self.function.args, *self.arguments, **settings).compile()


def step_programs(
    cfg: ModelConfig, weights: Any, pages: Array, table: Edits, shapes: Shapes, *, functions: Functions
) -> list[Program]:
    """The steps and the sampler, in all shapes: what a start waits for."""
    pool = _spec(pages)
    run_chunk = partial(programs.run_chunk, cfg, functions=functions)
    run_rows = partial(programs.run_rows, cfg, functions=functions)
    draw_rows = partial(programs.draw_rows)
    chunks = [
        Program(_chunk_name(*size), run_chunk, (weights, pool, empty_batch(*size))) for size in shapes.chunk_batches
    ]
    rows = [
        Program(
            f"decode {size} rows, table of {shapes.table_width} pages",
            run_rows,
            (weights, pool, empty_batch(size, 1, shapes.table_width)),
        )
        for size in shapes.rows
    ]
    draws = [
        Program(f"sample {size} rows", draw_rows, draw_arguments(_floats(size, cfg.vocab_size), table))
        for size in shapes.drawn
    ]
    return chunks + rows + draws


def small_programs(
    cfg: ModelConfig, weights: Any, table: Edits, shapes: Shapes, *, functions: Functions, width: int
) -> list[Program]:
    """What only some requests need beside the steps."""
    head = weights["params"]["unembed"]
    in_prompt = partial(programs.find_prompt_logprobs, functions=functions, width=width)
    of_rows = partial(programs.find_logprobs, width=width)
    sizes = sorted({size for size, _ in shapes.chunks})
    hidden = [jax.ShapeDtypeStruct((1, size, cfg.model_dim), functions.compute_dtype) for size in sizes]
    ids = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in shapes.drawn]
    return [
        *(Program("prompt logprobs", in_prompt, (head, one, np.zeros(one.shape[1], np.int32))) for one in hidden),
        *(Program("logprobs", of_rows, (_floats(one.size, cfg.vocab_size), one)) for one in ids),
        *(Program("count", partial(count), (table, np.zeros(one.size, np.int32), one)) for one in ids),
        Program("set row", partial(set_row), (table, np.int32(0), last_row(table))),
    ]


def compile_all(todo: list[Program], report: Callable[[int, int], None]) -> None:
    """Compiles programs; calls report(done, total) after each."""
    with ThreadPoolExecutor(COMPILED_AT_ONCE, thread_name_prefix="compile") as pool:
        running = [pool.submit(program.compile) for program in todo]
        try:
            for done, one in enumerate(as_completed(running), 1):
                one.result()
                report(done, len(todo))
        finally:
            for one in running:
                one.cancel()


def draw_arguments(logits: Any, table: Edits) -> tuple[Any, ...]:
    """Of `draw_rows`, with no sequence in any row."""
    size, vocab_size = logits.shape
    neutral = np.full(size, len(table.counts) - 1, np.int32)
    return logits, np.zeros(size, np.int32), sampling_rows([None] * size, vocab_size=vocab_size), table, neutral


def _chunk_name(num_sequences: int, num_tokens: int, num_pages: int) -> str:
    several = f"{num_sequences} chunks" if num_sequences > 1 else "chunk"
    return f"{several} of {num_tokens} tokens, table of {num_pages} pages"


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _spec(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
