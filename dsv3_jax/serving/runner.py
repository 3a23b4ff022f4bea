"""The device's side of an engine: weights, the pool of pages, and the programs of a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.serving import programs
from dsv3_jax.serving.batches import Batch, batches_of, empty_batch, positions_of
from dsv3_jax.serving.paged_cache import empty_pages
from dsv3_jax.serving.request_rows import sampling_rows
from dsv3_jax.serving.sequence import Drawn, Sequence, StepPlan, StepResult
from dsv3_jax.serving.shapes import shapes_of
from dsv3_jax.serving.warm_up import Program, compile_all
from dsv3_jax.serving.weights import check_same, weights_of
from dsv3_jax.typing import Array, DType, Int, Variables


class _Launched(NamedTuple):
    """A batch whose program runs, and what is wanted of it."""

    batch: Batch
    ids: Int[Array, "B"]


class Runner:
    """Runs plans; belongs to one thread.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}`.
        serving: room for sequences and pages.
        functions: what a layer is made of; default: `functions_of` the dtype that the parameters have.
    Raises:
        ConfigError: the pool does not fit into the device's memory.
    """

    def __init__(
        self, cfg: ModelConfig, variables: Variables, serving: ServingConfig, *, functions: Functions | None = None
    ):
        self._cfg, self._functions = cfg, functions or functions_of(variables["params"]["embed"]["w"].dtype)
        self._shapes = shapes_of(cfg, serving, on_cpu=jax.default_backend() == "cpu")
        self._weights = weights_of(cfg, variables, functions=self._functions)
        self._pages = _pool(cfg, self._shapes.num_pages, dtype=self._functions.compute_dtype)

    @property
    def num_pages(self) -> int:
        """Of the pool."""
        return self._shapes.num_pages

    @property
    def max_num_batched_tokens(self) -> int:
        """Of a step."""
        return self._shapes.max_num_batched_tokens

    @property
    def fingerprint(self) -> bytes:
        """Of the weights and of whatever else a page's rows depend on."""
        return self._weights.fingerprint

    def run(self, plan: StepPlan) -> StepResult:
        """Writes the rows of a plan's tokens into the pool, and draws a token behind each work that wants one."""
        launched = [self._launch(batch) for batch in batches_of(plan, self._shapes)]
        drawn = [Drawn(())] * len(plan.works)
        for (batch, _), ids in zip(launched, jax.device_get([each.ids for each in launched]), strict=True):
            for row, item in enumerate(batch.items):
                if item.draws:
                    drawn[item.index] = Drawn((int(ids[row]),))
        return StepResult(tuple(drawn))

    def forget(self, sequence: Sequence) -> None:
        """Frees what is stored for a sequence that has ended."""

    def update_weights(self, variables: Variables) -> None:
        """Computes with other weights from the next step on; what the pages hold is of the old ones.

        Raises:
            ConfigError: another tree, shape or dtype than before; nothing has changed then.
        """
        check_same(self._weights, variables)
        self._weights = weights_of(self._cfg, variables, functions=self._functions)

    def warm_up(self, report: Callable[[int, int], None]) -> None:
        """Compiles every program and runs each once; calls report(done, total) as they come."""
        todo = self._programs()
        compile_all(todo, report)
        for rows in self._shapes.rows:
            self._run_empty(programs.run_rows, rows, 1, self._shapes.table_width)
        for tokens, width in self._shapes.chunks:
            self._run_empty(programs.run_chunk, 1, tokens, width)
        jax.block_until_ready(self._pages)

    def shapes(self) -> list[str]:
        """What `warm_up` compiles, one line a program."""
        return [program.name for program in self._programs()]

    def _programs(self) -> list[Program]:
        settings = {"functions": self._functions}
        stored = self._cfg, self._weights.variables, jax.ShapeDtypeStruct(self._pages.shape, self._pages.dtype)
        width = self._shapes.table_width
        rows = [
            Program(
                f"decode {size} rows, {width} pages each",
                programs.run_rows,
                (*stored, empty_batch(size, 1, width)),
                settings,
            )
            for size in self._shapes.rows
        ]
        chunks = [
            Program(
                f"prefill {tokens} tokens, {pages} pages",
                programs.run_chunk,
                (*stored, empty_batch(1, tokens, pages)),
                settings,
            )
            for tokens, pages in self._shapes.chunks
        ]
        return rows + chunks

    def _run_empty(self, program: Any, num_rows: int, num_tokens: int, table_width: int) -> None:
        tokens = empty_batch(num_rows, num_tokens, table_width)
        self._pages, _ = program(self._cfg, self._weights.variables, self._pages, tokens, functions=self._functions)

    def _launch(self, batch: Batch) -> _Launched:
        """Starts a batch; nothing is waited for."""
        program = programs.run_chunk if batch.is_chunk else programs.run_rows
        weights, settings = self._weights.variables, {"functions": self._functions}
        self._pages, ran = program(self._cfg, weights, self._pages, batch.tokens, **settings)
        drawing = [item.work.sequence if item.draws else None for item in batch.items]
        if not any(sequence is not None and sequence.params.temperature > 0 for sequence in drawing):
            return _Launched(batch, ran.likeliest)
        drawing += [None] * (len(batch.tokens.counts) - len(drawing))
        sampling = sampling_rows(drawing, vocab_size=self._cfg.vocab_size)
        return _Launched(batch, programs.draw_rows(ran.logits, positions_of(batch), sampling))


def _pool(cfg: ModelConfig, num_pages: int, *, dtype: DType) -> Array:
    """Empty pages, if there is room for them."""
    spec = jax.eval_shape(lambda: empty_pages(cfg, num_pages, dtype))
    size = spec.size * spec.dtype.itemsize
    known = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in known:
        free = known["bytes_limit"] - known.get("bytes_in_use", 0)
        check(
            size <= free,
            f"num_pages={num_pages} needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the device are free "
            f"beside the weights; at most {free * num_pages // size} pages fit (ServingConfig.num_pages).",
        )
    return empty_pages(cfg, num_pages, dtype)
