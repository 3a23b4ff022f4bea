"""The device's side of an engine: weights, the pool of pages, and the programs of a step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.serving import programs
from dsv3_jax.serving.batches import Batch, asks_prompt_logprobs, batches_of, empty_batch
from dsv3_jax.serving.drawn import Outputs, result_of
from dsv3_jax.serving.edit_slots import EditSlots
from dsv3_jax.serving.paged_cache import empty_pages
from dsv3_jax.serving.request_rows import has_edits, sampling_rows
from dsv3_jax.serving.sampler import Sampling, TopLogprobs
from dsv3_jax.serving.sequence import Sequence, StepPlan, StepResult
from dsv3_jax.serving.shapes import shapes_of
from dsv3_jax.serving.steady import steady
from dsv3_jax.serving.warm_up import Program, compile_all, draw_arguments, small_programs, step_programs
from dsv3_jax.serving.weights import check_same, weights_of
from dsv3_jax.typing import Array, DType, Int, Variables


class Launched(NamedTuple):
    """A plan whose programs run."""

    plan: StepPlan
    batches: list[Batch]
    outputs: list[Outputs]


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
        functions = functions or functions_of(variables["params"]["embed"]["w"].dtype)
        on_cpu = jax.default_backend() == "cpu"
        self._cfg, self._stored_by = cfg, functions
        self._functions = steady(functions) if on_cpu else functions
        self._shapes = shapes_of(cfg, serving, on_cpu=on_cpu)
        self._weights = weights_of(cfg, variables, functions=functions)
        self._pages = _pool(cfg, self._shapes.num_pages, dtype=functions.compute_dtype)
        self._edits = EditSlots(serving.max_num_seqs, cfg.vocab_size)
        self._sampled = [], jax.device_put(sampling_rows([None], vocab_size=cfg.vocab_size))
        self._width = min(max(serving.max_logprobs, 1), cfg.vocab_size)

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

    def launch(self, plan: StepPlan) -> Launched:
        """Starts to write rows of a plan's tokens into the pool, and to draw a token behind each work that wants one.

        Nothing is waited for. The next plan is launched after `wait`.
        """
        batches = batches_of(plan, self._shapes)
        return Launched(plan, batches, [self._start(batch) for batch in batches])

    def wait(self, launched: Launched) -> StepResult:
        """What a plan's programs gave, once they have ended."""
        return result_of(launched.plan, launched.batches, jax.device_get(launched.outputs))

    def forget(self, sequence: Sequence) -> None:
        """Frees what is stored for a sequence that has ended."""
        self._edits.forget(sequence)

    def update_weights(self, variables: Variables) -> None:
        """Computes with other weights from the next step on; what the pages hold is of the old ones.

        Raises:
            ConfigError: another tree, shape or dtype than before; nothing has changed then.
        """
        check_same(self._weights, variables)
        self._weights = weights_of(self._cfg, variables, functions=self._stored_by)

    def warm_up(self, report: Callable[[int, int], None]) -> None:
        """Compiles every program and runs it once; calls report(done, total) as they come."""
        weights, table = self._weights.variables, self._edits.table
        settings = {"functions": self._functions, "width": self._width}
        small = small_programs(self._cfg, weights, table, self._shapes, **settings)
        compile_all(self._steps() + small, report)
        width = self._shapes.table_width
        for tokens in [empty_batch(size, 1, width) for size in self._shapes.rows]:
            self._exercise(Batch([], tokens, is_chunk=False))
        for size in self._shapes.chunk_batches:
            self._exercise(Batch([], empty_batch(*size), is_chunk=True))
        jax.block_until_ready(self._pages)

    def shapes(self) -> list[str]:
        """What steps and sampler are compiled for, one line a program."""
        return [program.name for program in self._steps()]

    def _steps(self) -> list[Program]:
        arrays = self._weights.variables, self._pages, self._edits.table
        return step_programs(self._cfg, *arrays, self._shapes, functions=self._functions)

    def _exercise(self, batch: Batch) -> None:
        """Runs every program of a batch without sequences."""
        ran = self._step(batch)
        ids = programs.draw_rows(*draw_arguments(ran.logits, self._edits.table))
        programs.find_logprobs(ran.logits, ids, width=self._width)
        self._edits.exercise(ids)
        if batch.is_chunk and len(ids) == 1:
            self._find_prompt_logprobs(ran, np.zeros(batch.tokens.ids.shape[1], np.int32))

    def _step(self, batch: Batch) -> programs.Ran:
        program = programs.run_chunk if batch.is_chunk else programs.run_rows
        arrays = self._weights.variables, self._pages, batch.tokens
        self._pages, ran = program(self._cfg, *arrays, functions=self._functions)
        return ran

    def _start(self, batch: Batch) -> Outputs:
        """Starts a batch's programs."""
        ran = self._step(batch)
        drawing = [sequence for sequence in batch.drawing if sequence is not None]
        ids, logprobs, prompt_logprobs = ran.likeliest, None, None
        if any(sequence.params.temperature > 0 or has_edits(sequence) for sequence in drawing):
            ids = self._draw(batch, ran.logits)
        if any(sequence.params.logprobs is not None for sequence in drawing):
            logprobs = programs.find_logprobs(ran.logits, ids, width=self._width)
        if batch.is_chunk and asks_prompt_logprobs(batch.items[0].work):
            prompt_logprobs = self._find_prompt_logprobs(ran, batch.following)
        return Outputs(ids, logprobs, prompt_logprobs)

    def _draw(self, batch: Batch, logits: Array) -> Array:
        drawing = batch.drawing
        slots = self._edits.slots_of(drawing)
        ids = programs.draw_rows(logits, batch.positions, self._sampling_of(drawing), self._edits.table, slots)
        self._edits.count(drawing, slots, ids)
        return ids

    def _sampling_of(self, drawing: list[Sequence | None]) -> Sampling:
        """On the device; the last batch's where the sequences are the same, as in most steps."""
        if drawing != self._sampled[0]:
            self._sampled = drawing, jax.device_put(sampling_rows(drawing, vocab_size=self._cfg.vocab_size))
        return self._sampled[1]

    def _find_prompt_logprobs(self, ran: programs.Ran, following: Int[np.ndarray, "T"]) -> TopLogprobs:
        head, settings = self._weights.variables["params"]["unembed"], {"functions": self._functions}
        return programs.find_prompt_logprobs(head, ran.step.hidden, following, width=self._width, **settings)


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
