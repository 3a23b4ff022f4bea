"""Tiles for shapes: the tables are sound, and the model stands in where they are silent."""

import types

import jax.numpy as jnp
import pytest

from dsv3_kernels import target, tiles
from dsv3_kernels.tiles import choice, model, tuning


@pytest.mark.parametrize("kind", sorted(tiles.FILES))
def test_tiles_of_the_tables_fit(kind):
    tuned = tiles.tuned_tiles(kind)
    assert tuned
    for problem, tile in tuned:
        assert tiles.choose(kind, problem) in [other for _, other in tuned]
        assert model.slots(problem, tile) >= 1


def test_tables_have_a_row_for_every_case():
    rows = {(row["kind"], *row["problem"].values()) for kind in tiles.FILES for row in tiles.table(kind)}
    assert {(kind, *problem) for kind, problem in tuning.problems()} == rows


def test_a_decoding_batch_takes_the_tile_of_a_full_one():
    def choose(m):
        problem = tiles.dense(m, 2112, 7168, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
        return tiles.choose(tiles.DENSE, problem)

    assert choose(1) == choose(33) == choose(64)
    assert choose(64).block_m == 64
    assert choose(4096).block_m >= 128


def test_a_shape_without_a_row_takes_the_tile_of_the_model():
    problem = tiles.dense(1025, 1000, 1280, out_dtype=jnp.float32, is_b_scaled_by_row=False)
    tile = tiles.choose(tiles.DENSE, problem)
    assert tile == model.best_tile(problem)
    assert model.slots(problem, tile) >= 1


def test_a_tile_too_wide_for_the_output_is_passed_over(monkeypatch):
    problem = tiles.dense(4096, 4096, 7168, out_dtype=jnp.float32, is_b_scaled_by_row=False)
    row = {"kind": "dense", "problem": problem._asdict(), "tile": {"block_m": 256, "block_n": 128, "stages": 6}}
    monkeypatch.setattr(choice, "table", lambda kind: [row])
    assert tiles.choose(tiles.DENSE, problem) == model.best_tile(problem)


def test_each_device_has_tables_of_its_own_and_h100_stands_in(tmp_path, monkeypatch):
    assert choice.device_folder() == "h100_sxm" or target.gpu() is not None
    monkeypatch.setattr(target, "gpu", lambda: types.SimpleNamespace(device_kind="NVIDIA H200"))
    assert choice.device_folder() == "nvidia_h200"
    assert tiles.table(tiles.DENSE) == choice._read("fp8_gemm", "h100_sxm")
    monkeypatch.setattr(choice.importlib.resources, "files", lambda package: tmp_path)
    tuning._write(tmp_path / "tuned" / "nvidia_h200" / "fp8_gemm.json", [{"kind": "dense"}])
    choice._read.cache_clear()
    assert tiles.table(tiles.DENSE) == [{"kind": "dense"}]
    choice._read.cache_clear()
