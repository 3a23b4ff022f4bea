"""The choice on a GPU: the fastest tile whose result is right."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import dispatch, tiles
from dsv3_kernels.sm90.tile import Tile
from dsv3_kernels.tiles import model, trial

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
    with pytest.raises(RuntimeError, match=r"64x64 s5.*gives the right result"):
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
