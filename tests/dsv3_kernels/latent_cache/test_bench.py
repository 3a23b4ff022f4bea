"""What a GPU run checks of the latent cache detects a wrong row."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels.latent_cache import bench
from dsv3_kernels.latent_cache.cases import UGLY


@pytest.mark.parametrize("case", [UGLY[1], UGLY[3]], ids=lambda case: case.name)
def test_a_row_in_the_wrong_slot_fails(case) -> None:
    given = bench.make_inputs(case, jax.random.key(3))
    right = bench._run(given, "xla")
    assert bench.worst_row(right, bench._run(given, "reference")) < bench.LIMITS[case.fp8]
    page = given["page_table"][0, 0]
    moved = right.at[page].set(jnp.roll(right[page], 1, axis=0))
    assert not bench.worst_row(moved, right) < bench.LIMITS[case.fp8]
