"""Tiles for shapes: the tables are sound, and the model stands in where they are silent."""

import types

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import dispatch, tiles
from dsv3_kernels.sm90.tile import SHARED_LIMIT, Tile, output_slots, stage_bytes
from dsv3_kernels.tiles import choice, model, trial, tuning


@pytest.mark.parametrize("kind", sorted(tiles.FILES))
def test_tiles_of_the_tables_fit(kind):
    tuned = tiles.tuned_tiles(kind)
    assert tuned
    for problem, tile in tuned:
        assert tiles.choose(kind, problem) in [other for _, other in tuned]
        by_row = problem.is_b_scaled_by_row
        dtype = jnp.float32 if tile.split_k > 1 else problem.out_dtype
        assert output_slots(tile, dtype, is_b_scaled_by_row=by_row) >= 1
        assert tile.stages * stage_bytes(tile, is_b_scaled_by_row=by_row) < SHARED_LIMIT


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
    assert output_slots(tile, jnp.float32, is_b_scaled_by_row=False) >= 1


def test_a_tile_too_wide_for_the_output_is_passed_over(monkeypatch):
    problem = tiles.dense(4096, 4096, 7168, out_dtype=jnp.float32, is_b_scaled_by_row=False)
    row = {"kind": "dense", "problem": problem._asdict(), "tile": {"block_m": 256, "block_n": 128, "stages": 6}}
    monkeypatch.setattr(choice, "table", lambda kind: [row])
    assert tiles.choose(tiles.DENSE, problem) == model.best_tile(problem)


def test_model_fills_the_gpu_and_keeps_groups_apart():
    few = tiles.dense(64, 2112, 7168, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
    narrow = Tile(64, 64, 10)
    assert model.seconds(few, Tile(64, 64, 10, split_k=4)) < model.seconds(few, narrow)
    for tile in model.candidates(tiles.contiguous(8192, 4096, 7168, out_dtype=jnp.bfloat16)):
        assert tile.block_m <= 128
        assert tile.cluster != "m"
        assert tile.split_k == 1


def test_writing_the_modelled_tables_changes_nothing_that_is_modelled(monkeypatch):
    written = {}
    monkeypatch.setattr(tuning, "_write", lambda path, rows: written.update({path.stem: rows}))
    assert tuning.main(["--model"]) == 0
    for kind, name in tiles.FILES.items():
        if all(row["source"] == "modelled" for row in tiles.table(kind)):
            assert written[name] == tiles.table(kind)


RIGHT, WRONG, BROKEN = Tile(64, 64, 4), Tile(64, 64, 5), Tile(64, 64, 6)


def _trial():
    def kernel(x, tile):
        if tile == BROKEN:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much shared memory\nmore")
        return x * 2 if tile == RIGHT else x * 2 + 1

    return trial.Trial([jnp.arange(8.0)], kernel, lambda x: 2 * x)


def _seconds_by_stages(function, sets):
    return {4: 3.0, 5: 2.0, 6: 1.0}[function.keywords["tile"].stages]


def test_a_faster_tile_with_a_wrong_product_is_not_chosen(capsys):
    assert trial.fastest(_trial(), [WRONG, BROKEN, RIGHT], _seconds_by_stages) == (RIGHT, 3.0)
    said = capsys.readouterr().err
    assert f"tile {WRONG.name} is wrong" in said
    assert f"tile {BROKEN.name} does not run: RESOURCE_EXHAUSTED: too much shared memory" in said


def test_no_right_tile_is_an_error():
    with pytest.raises(RuntimeError, match=r"64x64 s5.*gives the right product"):
        trial.fastest(_trial(), [WRONG], _seconds_by_stages)


SMALL = {
    tiles.DENSE: tiles.dense(64, 96, 256, out_dtype=jnp.bfloat16, is_b_scaled_by_row=True),
    tiles.CONTIGUOUS: tiles.contiguous(1024, 64, 128, out_dtype=jnp.bfloat16),
    tiles.MASKED: tiles.masked(2, 64, 64, 128, out_dtype=jnp.float32),
    tiles.CONTRACTION: tiles.contraction(2, 64, 64, 256),
}


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="the kernels need a newer jax")
@pytest.mark.parametrize("kind", sorted(SMALL))
def test_kernel_and_plain_form_of_a_trial_are_the_same_product(kind, monkeypatch):
    monkeypatch.setattr(trial, "num_input_sets", lambda num_bytes: 2)
    made = trial.make_trial(kind, SMALL[kind])
    tile = model.best_tile(SMALL[kind])
    out = jax.eval_shape(lambda x: made.kernel(x, tile=tile), made.sets[0])
    plain = jax.jit(made.plain)(made.sets[0])
    assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
    assert bool((plain != 0).any(-1).all())
    assert len(made.sets) == 2
    assert bool((made.sets[0][0].values != made.sets[1][0].values).any())


def test_each_device_has_tables_of_its_own_and_h100_stands_in(tmp_path, monkeypatch):
    assert choice.device_folder() == "h100_sxm" or jax.devices()[0].platform == "gpu"
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(choice.jax, "devices", lambda: [device])
    assert choice.device_folder() == "nvidia_h200"
    assert tiles.table(tiles.DENSE) == choice._read("fp8_gemm", "h100_sxm")
    monkeypatch.setattr(choice.importlib.resources, "files", lambda package: tmp_path)
    tuning._write(tmp_path / "tuned" / "nvidia_h200" / "fp8_gemm.json", [{"kind": "dense"}])
    choice._read.cache_clear()
    assert tiles.table(tiles.DENSE) == [{"kind": "dense"}]
    choice._read.cache_clear()
