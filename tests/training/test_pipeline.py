"""Gradients of a pipeline against those of one device, and what its program has in it."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch, make_batch, stack
from dsv3_jax.model.functions import functions_for
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline.ticks import sizes_for
from dsv3_jax.training.pipelined import micro_batches_of, pipeline_gradients, place_all
from dsv3_jax.training.state import TrainState, state_shardings
from dsv3_jax.training.step import Rates, Sums, batch_loss, denominators_of, gradients_of
from tests.small import make_variables

pytestmark = pytest.mark.usefixtures("compile_quickly")

COMPILED_QUICKLY: Any = {"xla_backend_optimization_level": 0}  # half the time; the program in HLO is the same
RATES = Rates(np.float32(1e-2), np.float32(0.3), np.float32(0.01))


def a_run(repository, *changes: str) -> RunConfig:
    """Four micro-batches to sixteen, two rows each; as many layers as stages, the last of MTP."""
    settings = ["parallel.pipe=2", "train.remat=paper", "train.batch.start=8", "train.batch.full=32"]
    return load_config(repository / "tests" / "training" / "midget.py", [*settings, "model.num_layers=3", *changes])


def a_state(cfg: RunConfig) -> TrainState:
    variables = make_variables(cfg.model, dtype=functions_for(cfg.precision).param_dtype)
    return TrainState(variables["params"], variables["router_state"], ())


def batches_of(cfg: RunConfig, num: int) -> Batch:
    """Two documents and some padding in each row."""
    rng, shape = np.random.default_rng(num), (cfg.train.batch.micro, cfg.train.seq_len + 1)

    def micro_batch() -> Batch:
        ends = np.sort(rng.integers(2, shape[1], (shape[0], 2)), axis=1)
        place = np.arange(shape[1])[None, :]
        segments = np.where(place < ends[:, :1], 1, np.where(place < ends[:, 1:], 2, 0))
        tokens = rng.integers(0, cfg.model.vocab_size, shape)
        return make_batch(tokens, segments, mtp_depth=cfg.model.mtp_depth, document_mask=cfg.data.document_mask)

    return stack([micro_batch() for _ in range(num)])


def compiled_on(cfg: RunConfig, num_devices: int) -> SimpleNamespace:
    """The gradients of a pipeline, compiled once; `call` takes any number of micro-batches."""
    mesh = make_mesh(cfg.parallel, jax.devices()[:num_devices])
    sizes = sizes_for(cfg.parallel.schedule, cfg.parallel.pipe, micro_batches_of(cfg))
    gradients = pipeline_gradients(cfg, mesh, functions_for(cfg.precision), sizes)
    shardings, state = state_shardings(cfg, mesh), a_state(cfg)
    on_mesh = jax.tree.map(jax.device_put, state, shardings._replace(opt_state=()))
    placed = partial(place_all, cfg=cfg, mesh=mesh, sizes=sizes)
    free: Any = None
    jitted = jax.jit(gradients, out_shardings=Sums(free, free, shardings.params))
    compiled = jitted.lower(on_mesh, placed(batches_of(cfg, 4)), RATES).compile(COMPILED_QUICKLY)
    reference = jax.jit(partial(gradients_of, partial(batch_loss, cfg=cfg)), compiler_options=COMPILED_QUICKLY)

    def call(batches: Batch) -> Sums:
        return compiled(on_mesh, placed(batches), RATES)

    def on_one(batches: Batch) -> Sums:
        micro = [jax.tree.map(lambda leaf, at=at: leaf[at], batches) for at in range(len(batches.tokens))]
        each = [reference(state, batch, denominators_of(batches), RATES) for batch in micro]
        return jax.tree.map(lambda *sums: sum(sums[1:], sums[0]), *each)

    return SimpleNamespace(cfg=cfg, call=call, on_one=on_one, text=compiled.as_text())


def assert_same(found: Sums, expected: Sums, *, tolerance: float = 1e-5) -> None:
    """Counts equal, numbers within `tolerance` of the largest of their array."""
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.dtype == np.int32:
            np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))
        elif ours.size:
            limit = tolerance * np.abs(theirs).max()
            assert np.abs(ours - theirs).max() <= limit, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def pipeline(repository, compile_quickly) -> SimpleNamespace:
    """DualPipeV on two ranks, with experts on two devices each."""
    return compiled_on(a_run(repository, "parallel.expert=2"), 4)


@pytest.mark.parametrize("num_micro_batches", [4, 8, 12, 16])
def test_one_program_gives_one_devices_gradients_for_any_number_of_micro_batches(pipeline, num_micro_batches):
    batches = batches_of(pipeline.cfg, num_micro_batches)
    assert_same(pipeline.call(batches), pipeline.on_one(batches))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "num_devices"),
    [
        # Two flows; stages of one layer and two; heads and widths split.
        (["schedule=dualpipe", "tensor=2", "model.num_layers=3", "model.mla.num_heads=4", "model.ffn_dim=28"], 4),
        # One stage a rank, two MTP modules, attention across documents, batch rows on two devices.
        (["schedule=one_f_one_b", "data=2", "model.mtp_depth=2", "data.document_mask=false"], 4),
        # Four ranks, experts on two devices each, three dense layers, everything computed again.
        (["pipe=4", "expert=2", "model.num_layers=9", "model.num_dense_layers=3", "train.remat=full"], 8),
    ],
    ids=["dualpipe", "one_f_one_b", "dualpipe_v"],
)
def test_other_pipelines_give_one_devices_gradients(repository, changes, num_devices):
    settings = [change if "." in change else f"parallel.{change}" for change in changes]
    other = compiled_on(a_run(repository, *settings, "model.moe.expert_dim=10"), num_devices)
    for num_micro_batches in (4, 7, 12):
        batches = batches_of(other.cfg, num_micro_batches)
        assert_same(other.call(batches), other.on_one(batches))


COLLECTIVE = re.compile(r" (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(-start)?\(")


def computations(text: str) -> dict[str, list[str]]:
    """Instructions of each computation of an HLO module."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            found[header.group(1)] = []
        elif found and line.startswith("  "):
            list(found.values())[-1].append(line)
    return found


def reached(found: dict[str, list[str]], roots: set[str]) -> Iterator[str]:
    """Instructions of `roots` and of what they call."""
    left, seen = list(roots), set()
    while left:
        name = left.pop()
        if name in found and name not in seen:
            seen.add(name)
            for line in found[name]:
                yield line
                left += re.findall(r"%([\w.\-]+)", line)


def branches(lines: Iterable[str]) -> set[str]:
    """Computations that a conditional may run."""
    listed = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+)")
    of_conditionals = [found for line in lines if " conditional(" in line for found in listed.findall(line)]
    return {name for some in of_conditionals for name in re.findall(r"%([\w.\-]+)", " ".join(some))}


def is_exchange(line: str) -> bool:
    """Between the devices that have the experts, by the scope it was made in."""
    return " all-to-all(" in line and "exchange_" in line


def test_a_backward_pass_repeats_no_exchange(pipeline):
    """Of each slot: forward sends rows, ids and weights, and brings sums home; backward all of these but ids."""
    kinds_of_tick = 3  # any, and the two of the steady run
    assert sum(map(is_exchange, pipeline.text.splitlines())) == kinds_of_tick * (4 + 3)


def test_branches_have_no_collective_over_the_pipeline_and_in_the_steady_run_none(pipeline):
    found = computations(pipeline.text)
    in_branches = [line for line in reached(found, branches(pipeline.text.splitlines())) if COLLECTIVE.search(line)]
    assert in_branches  # a tick that a rank may sit out
    assert all(map(is_exchange, in_branches))
    steady = [name for name in re.findall(r"\bbody=%?([\w.\-]+)", pipeline.text) if any(map(is_exchange, found[name]))]
    assert len(steady) == 1
    assert any(" collective-permute(" in line for line in found[steady[0]])
    in_its_branches = list(reached(found, branches(reached(found, set(steady)))))
    assert in_its_branches
    assert not [line for line in in_its_branches if COLLECTIVE.search(line)]
