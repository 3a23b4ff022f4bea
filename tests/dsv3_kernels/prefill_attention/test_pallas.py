"""The Hopper kernels of prefill attention, in the interpreter, and what they leave to XLA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import dispatch, mla_prefill
from dsv3_kernels.prefill_attention.block_ranges import overlaps, visits
from dsv3_kernels.prefill_attention.visibility import query_positions, seen_keys

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="jax older than the kernels need"
)


@needs_pallas
@pytest.mark.parametrize(
    "names",
    [
        ["drawn packed"],
        pytest.param(["drawn", "chunk of packed", "one document", "unequal starts"], marks=pytest.mark.slow),
    ],
    ids=["drawn", "the rest"],
)
def test_kernels_agree_with_the_reference(names, interpreted) -> None:
    _, *reports = map(json.loads, interpreted(*names).splitlines())
    assert [report["name"] for report in reports] == names
    for report in reports:
        assert all(report["errors"][part] < most for part, most in report["most"].items()), report


@needs_pallas
@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "message"),
    [
        ((1, 8, 2, 192), jnp.float32, 0.1, "takes bfloat16"),
        ((1, 8, 2, 128), jnp.bfloat16, 0.1, "head sizes 192 and 128"),
        ((1, 8, 2, 192), jnp.bfloat16, -0.1, "softmax_scale=-0.1 is not positive"),
    ],
)
def test_what_the_kernels_refuse_is_left_to_xla(shape, dtype, scale, message) -> None:
    q, v = jnp.ones(shape, dtype), jnp.ones((*shape[:3], 128), dtype)
    with pytest.raises(NotImplementedError, match=message):
        mla_prefill(q, q, v, softmax_scale=scale, implementation="pallas")


@pytest.mark.parametrize("kind", ["one document", "sorted", "unsorted"])
@pytest.mark.parametrize("start", [-40, 0, 37, 300])
def test_no_visible_key_is_skipped_and_no_hidden_one_unmasked(kind: str, start: int) -> None:
    """Against the whole matrix: everything visible lies in the visited blocks, and unmasked blocks are all visible."""
    rng = np.random.default_rng(start + 50)
    T, S, num_keys, q_tile, kv_block = 192, 256, 250, 32, 16
    q_ids = kv_ids = None
    if kind != "one document":
        ids = rng.integers(1, 5, (2, T + S))
        ids = np.sort(ids) if kind == "sorted" else ids // np.array([[1], [4]])
        q_ids, kv_ids = (jnp.asarray(x, jnp.int32) for x in (ids[:, S // 2 : S // 2 + T], ids[:, :S]))
    starts = jnp.asarray([start, start + 5], jnp.int32)
    found = overlaps(
        q_ids,
        kv_ids,
        starts,
        q_tiles=T // q_tile,
        kv_blocks=S // kv_block,
        q_tile=q_tile,
        kv_block=kv_block,
        num_keys=num_keys,
    )
    positions = query_positions(starts, T, default_start=0)
    seen = np.array(seen_keys(positions, jnp.arange(S), q_ids, kv_ids))
    seen[:, :, num_keys:] = False
    blocks = seen.reshape(2, T // q_tile, q_tile, S // kv_block, kv_block)
    for some, every, turned in (
        (found.some, found.every, blocks),
        (found.some.swapaxes(1, 2), found.every.swapaxes(1, 2), np.moveaxis(blocks, (1, 2), (3, 4))),
    ):
        ranges = np.asarray(visits(some, every))
        index = np.arange(turned.shape[3])
        begin, a, b, end = (ranges[..., i, None] for i in range(4))
        assert ((begin <= a) & (a <= b) & (b <= end)).all()
        is_visited, is_unmasked = (begin <= index) & (index < end), (a <= index) & (index < b)
        assert is_visited[turned.any(axis=(2, 4))].all()
        assert turned.all(axis=(2, 4))[is_unmasked].all()
        if kind == "one document":  # nothing is visited or masked in vain
            np.testing.assert_array_equal(is_visited, turned.any(axis=(2, 4)))
            np.testing.assert_array_equal(is_unmasked, turned.all(axis=(2, 4)))
