"""Rows on their way between two devices, as they are or in eight bits."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.travel import FP8, PLAIN, bring_home, send_out
from dsv3_jax.precision.gradient_tiles import gradient_rows
from dsv3_jax.precision.wire import from_payload, to_payload
from dsv3_kernels.quantize import dequantize_tiles

ROWS, DIM = 6, 200


def test_activations_are_quantised_out_and_gradients_home():
    """Whatever else travels keeps every bit."""
    rng = np.random.default_rng(1)
    x, d = (
        jnp.asarray(rng.normal(size=(2 * ROWS, DIM)) * 10.0 ** rng.integers(-5, 5, (2 * ROWS, 1))) for _ in range(2)
    )
    x, d = x.astype(jnp.bfloat16), d.astype(jnp.bfloat16)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("expert")

    def there_and_back(x, d):
        found = {}
        for name, wire in (("plain", PLAIN), ("fp8", FP8)):
            for way in (send_out, bring_home):
                out, through = jax.vjp(lambda x, way=way, wire=wire: way(x, "expert", wire), x)
                found[name, way.__name__] = out, through(d)[0]
        return found

    found = jax.jit(jax.shard_map(there_and_back, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=True))(x, d)

    def moved(rows):
        half = ROWS // 2
        return np.concatenate([rows[:half], rows[2 * half : 3 * half], rows[half : 2 * half], rows[3 * half :]])

    narrow = from_payload(to_payload(x), dtype=jnp.bfloat16)
    narrow_d = dequantize_tiles(gradient_rows(d, tile=(1, 128), scale="ue8m0"), tile=(1, 128), dtype=jnp.bfloat16)
    assert (narrow != x).any()
    assert (narrow_d != d).any()
    expected = {
        ("plain", "send_out"): (x, d),
        ("plain", "bring_home"): (x, d),
        ("fp8", "send_out"): (narrow, d),
        ("fp8", "bring_home"): (x, narrow_d),
    }
    for name, pair in expected.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            np.testing.assert_array_equal(ours, moved(theirs), err_msg=str(name))
