"""Tiles for shapes: the tables are sound, and the model stands in where they are silent."""

import jax.numpy as jnp
import pytest

from dsv3_kernels import tuning
from dsv3_kernels.sm90 import model
from dsv3_kernels.sm90.tile import SHARED_LIMIT, Tile, output_slots, stage_bytes


@pytest.mark.parametrize("kind", sorted(tuning.FILES))
def test_tiles_of_the_tables_fit(kind):
    tuned = tuning.tuned_tiles(kind)
    assert tuned
    for problem, tile in tuned:
        assert tuning.choose(kind, problem) in [other for _, other in tuned]
        by_row = problem.is_b_scaled_by_row
        dtype = jnp.float32 if tile.split_k > 1 else problem.out_dtype
        assert output_slots(tile, dtype, is_b_scaled_by_row=by_row) >= 1
        assert tile.stages * stage_bytes(tile, is_b_scaled_by_row=by_row) < SHARED_LIMIT


def test_tables_have_a_row_for_every_case():
    rows = {(row["kind"], *row["problem"].values()) for kind in tuning.FILES for row in tuning.table(kind)}
    assert {(kind, *problem) for kind, problem in tuning.problems()} == rows


def test_a_decoding_batch_takes_the_tile_of_a_full_one():
    def choose(m):
        problem = tuning.dense(m, 2112, 7168, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
        return tuning.choose(tuning.DENSE, problem)

    assert choose(1) == choose(33) == choose(64)
    assert choose(64).block_m == 64
    assert choose(4096).block_m >= 128


def test_a_shape_without_a_row_takes_the_tile_of_the_model():
    problem = tuning.dense(1025, 1000, 1280, out_dtype=jnp.float32, is_b_scaled_by_row=False)
    tile = tuning.choose(tuning.DENSE, problem)
    assert tile == model.best_tile(problem)
    assert output_slots(tile, jnp.float32, is_b_scaled_by_row=False) >= 1


def test_a_tile_too_wide_for_the_output_is_passed_over(monkeypatch):
    problem = tuning.dense(4096, 4096, 7168, out_dtype=jnp.float32, is_b_scaled_by_row=False)
    row = {"kind": "dense", "problem": problem._asdict(), "tile": {"block_m": 256, "block_n": 128, "stages": 6}}
    monkeypatch.setattr(tuning, "table", lambda kind: [row])
    assert tuning.choose(tuning.DENSE, problem) == model.best_tile(problem)


def test_model_fills_the_gpu_and_keeps_groups_apart():
    few = tuning.dense(64, 2112, 7168, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
    narrow = Tile(64, 64, 10)
    assert model.seconds(few, Tile(64, 64, 10, split_k=4)) < model.seconds(few, narrow)
    for tile in model.candidates(tuning.contiguous(8192, 4096, 7168, out_dtype=jnp.bfloat16)):
        assert tile.block_m <= 128
        assert tile.cluster != "m"
        assert tile.split_k == 1


def test_writing_the_modelled_tables_changes_nothing_that_is_modelled(monkeypatch):
    written = {}
    monkeypatch.setattr(tuning, "_write", lambda path, rows: written.update({path.stem: rows}))
    assert tuning.main(["--model"]) == 0
    for kind, name in tuning.FILES.items():
        if all(row["source"] == "modelled" for row in tuning.table(kind)):
            assert written[name] == tuning.table(kind)
