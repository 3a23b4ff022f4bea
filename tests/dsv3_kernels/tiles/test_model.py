"""The cost model: what was measured is possible, and what is worth timing is a candidate."""

import jax.numpy as jnp
import pytest

from dsv3_kernels import tiles
from dsv3_kernels.gemm.bench import DEEPGEMM
from dsv3_kernels.grouped_gemm.bench import CONTIGUOUS_DEEPGEMM, MASKED_DEEPGEMM
from dsv3_kernels.sm90 import model as by_architecture
from dsv3_kernels.sm90.tile import BLOCK_K, CONSUMERS, SHARED_LIMIT, Tile, output_chunk
from dsv3_kernels.tiles import model

HEADLINE = tiles.dense(4096, 7168, 16384, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
FEW_ROWS = tiles.dense(64, 2112, 7168, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
WEIGHT_GRADIENT = tiles.dense(7168, 2048, 4096, out_dtype=jnp.float32, is_b_scaled_by_row=True)
GROUPS_OF_ROWS = tiles.contiguous(8192, 4096, 7168, out_dtype=jnp.bfloat16)


def published():
    """(problem, FLOPs, TFLOPS that DeepGEMM measured)."""
    for (m, n, k), (tflops, _) in DEEPGEMM.items():
        yield tiles.dense(m, n, k, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False), 2 * m * n * k, tflops
    for (groups, rows, n, k), (tflops, _) in CONTIGUOUS_DEEPGEMM.items():
        yield tiles.contiguous(groups * rows, n, k, out_dtype=jnp.bfloat16), 2 * groups * rows * n * k, tflops
    for (groups, m, n, k), (tflops, _) in MASKED_DEEPGEMM.items():
        yield tiles.masked(groups, m, n, k, out_dtype=jnp.bfloat16), 2 * groups * m * n * k, tflops


def test_no_published_rate_is_impossible():
    rates = [
        (flops / model.seconds(problem, model.best_tile(problem)) / 1e12, tflops)
        for problem, flops, tflops in published()
    ]
    assert len(rates) == 28
    assert not [(modelled, measured) for modelled, measured in rates if modelled < measured]
    assert max(modelled for modelled, _ in rates) < 2 * model.FMA_PER_CYCLE * model.SMS * model.CLOCK / 1e12


def test_what_is_timed_holds_the_best_by_either_rate_of_l2():
    by_wide, by_narrow = model.candidates(HEADLINE)[0], model.candidates(HEADLINE, l2=model.L2_NARROW)[0]
    assert by_wide == model.best_tile(HEADLINE) != by_narrow
    assert {by_wide, by_narrow} == set(model.shortlist(HEADLINE, 1))
    timed = model.shortlist(HEADLINE, 4)
    assert timed[:2] == [by_wide, by_narrow]
    assert 4 <= len(timed) == len(set(timed)) <= 8


def test_what_is_timed_differs_in_more_than_stages():
    timed = model.shortlist(WEIGHT_GRADIENT, 6)
    kinds = {(t.block_m, t.block_n, t.cluster, t.split_k, model.slots(WEIGHT_GRADIENT, t)): t.stages for t in timed}
    assert len(kinds) == len(timed)
    for tile in model.candidates(WEIGHT_GRADIENT):
        kind = (tile.block_m, tile.block_n, tile.cluster, tile.split_k, model.slots(WEIGHT_GRADIENT, tile))
        assert kind not in kinds or tile.stages <= kinds[kind]


@pytest.mark.parametrize(
    ("problem", "clusters"),
    [
        pytest.param(HEADLINE, {"", "n", "m"}, id="forward"),
        pytest.param(FEW_ROWS, {"", "n"}, id="few rows"),
        pytest.param(WEIGHT_GRADIENT, {"", "n", "m"}, id="weight gradient"),
        pytest.param(GROUPS_OF_ROWS, {"", "n"}, id="groups of rows"),
    ],
)
def test_candidates_vary_stages_slots_and_clusters_and_fit(problem, clusters):
    found = model.candidates(problem)
    assert len(found) == len(set(found))
    stages = {tile.stages for tile in found}
    assert stages == set(range(3, max(stages) + 1))
    assert max(stages) >= 6
    # The narrow tiles of few rows are written in one piece.
    assert len({model.slots(problem, tile) for tile in found}) >= (1 if problem is FEW_ROWS else 2)
    assert {tile.cluster for tile in found} == clusters
    for tile in found:
        chunk, _ = output_chunk(tile.output_columns, problem.out_dtype)
        slots = model.slots(problem, tile)
        staged = CONSUMERS * slots * 64 * chunk * jnp.dtype(problem.out_dtype).itemsize
        assert slots >= 1
        assert tile.stages * (tile.block_m + tile.block_n) * BLOCK_K + staged < SHARED_LIMIT
        assert model.seconds(problem, tile) <= model.seconds(problem, tile, l2=model.L2_NARROW)


def test_fewer_stages_cost_time_only_where_operands_come_too_late():
    def seconds(stages):
        return model.seconds(FEW_ROWS, Tile(64, 64, stages))

    assert seconds(3) > seconds(4) >= seconds(10)
    whole, chunk = Tile(256, 128, 3, "n"), Tile(256, 128, 4, "n")
    assert (model.slots(HEADLINE, whole), model.slots(HEADLINE, chunk)) == (4, 1)
    assert model.seconds(HEADLINE, whole) < model.seconds(HEADLINE, chunk)


def test_model_fills_the_gpu_and_keeps_groups_apart():
    assert model.seconds(FEW_ROWS, Tile(64, 32, 10, split_k=2)) < model.seconds(FEW_ROWS, Tile(64, 64, 10))
    for tile in model.candidates(GROUPS_OF_ROWS):
        assert tile.block_m <= 128
        assert tile.cluster != "m"
        assert tile.split_k == 1


def test_the_architecture_names_its_model():
    assert by_architecture.best_tile is model.best_tile
    assert by_architecture.seconds is model.seconds
