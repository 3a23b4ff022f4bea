"""The Hopper kernel in Pallas' interpreter, how its parts are combined, and what it leaves to XLA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import dispatch, mla_decode
from dsv3_kernels.decode_attention.cases import DecodeCase, make_inputs
from dsv3_kernels.decode_attention.planner import plan_splits
from tests.dsv3_kernels.decode_attention.combine import combine

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the interpreter of jax 0.11.2 never ends on this kernel; lowering is tested"
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["drawn"],
        ["fp8"],
        pytest.param(["plan-few", "combine-some-empty"], marks=pytest.mark.slow),
        pytest.param(["combine-one-sequence", "combine-none-split", "combine-no-work"], marks=pytest.mark.slow),
        pytest.param(["splits", "stray-pages", "stray-pages-fp8", "beyond-table"], marks=pytest.mark.slow),
        pytest.param(
            ["one-sequence", "all-empty", "two-row-blocks", "two-row-blocks-alone", "not-causal"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["plan-b7", "plan-b128", "plan-b300", "combine-all-split"], marks=pytest.mark.slow),
        pytest.param(["--races", "splits", "two-row-blocks"], marks=pytest.mark.slow),
        pytest.param(["--races", "fp8", "drawn"], marks=pytest.mark.slow),
        pytest.param(["--races", "combine-some-empty", "combine-all-split", "plan-few"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_kernels_are_within_their_tolerances(arguments, interpreted):
    reports = [json.loads(line) for line in interpreted(*arguments).splitlines()]
    assert [report["case"] for report in reports] == [name for name in arguments if name != "--races"]


def test_combination_is_the_softmax_over_all_parts():
    """Slots filled by hand from the plan; those that nobody writes hold NaN, as do whole rows of split sequences."""
    lengths = np.array([1000, 0, 128, 3000], np.int32)
    parts = plan_splits(jnp.asarray(lengths), num_parts=5).parts
    rng = np.random.default_rng(1)
    scores, values = rng.normal(size=(4, 3, 24)) * 20, rng.normal(size=(4, 24, 6))  # 24 blocks of one key each
    out, lse = np.full((4, 3, 6), np.nan, np.float32), np.full((4, 3), np.nan, np.float32)
    part_out, part_lse = np.full((10, 3, 6), np.nan, np.float32), np.full((10, 3), np.nan, np.float32)
    expected_out, expected_lse = np.zeros((4, 3, 6)), np.full((4, 3), np.inf)

    def attend(b: int, begin: int, end: int):
        if begin == end:
            return np.zeros((3, 6)), np.full(3, np.inf)
        weights = np.exp(scores[b, :, begin:end])
        return weights @ values[b, begin:end] / weights.sum(1)[:, None], np.log(weights.sum(1))

    blocks = -(-lengths // 128)
    for part, (first, begin, last, end, _) in enumerate(np.asarray(parts).tolist()):
        for b in range(first, last + 1):
            span = begin if b == first else 0, end if b == last else int(blocks[b])
            if span == (0, blocks[b]):
                out[b], lse[b] = attend(b, *span)
            else:
                slot = 2 * part + (span[0] == 0)
                part_out[slot], part_lse[slot] = attend(b, *span)
    for b in range(4):
        expected_out[b], expected_lse[b] = attend(b, 0, int(blocks[b]))
    assert np.asarray(parts)[:, 4].max() > 2
    ours = combine(*map(jnp.asarray, (out, lse, part_out, part_lse)), parts)
    np.testing.assert_allclose(ours[0], expected_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], expected_lse, rtol=1e-6)


def test_part_that_sees_no_key_weighs_nothing():
    parts = plan_splits(jnp.array([1000], jnp.int32), num_parts=2).parts
    part_out = jnp.ones((4, 1, 2)) * jnp.array([7.0, 5.0, 3.0, 9.0])[:, None, None]
    out, lse = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1))
    for in_first, in_second, result in ((-jnp.inf, 2.0, 3.0), (2.0, -jnp.inf, 5.0)):
        part_lse = jnp.array([0.0, in_first, in_second, 0.0])[:, None]
        ours = combine(out, lse, part_out, part_lse, parts)
        assert ours[0].ravel().tolist() == [result] * 2
        assert ours[1].item() == 2.0
    ours = combine(out, lse, part_out, jnp.full((4, 1), -jnp.inf), parts)
    assert ours[0].ravel().tolist() == [0.0] * 2
    assert np.isposinf(ours[1]).all()


@pytest.mark.parametrize("mapping", ["shard_map", "vmap"])
def test_all_kernels_lower_under_mappings(mapping):
    """Outputs of the first are references of the second, which transformations of jax may refuse."""
    shapes = DecodeCase(4, 1, 16, 256).shapes()

    def decode(*inputs):
        return mla_decode(*inputs, softmax_scale=0.1)

    if mapping == "vmap":
        mapped, shapes = jax.vmap(decode), [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes]
    else:
        types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("data",), axis_types=types, devices=jax.devices()[:2])
        data, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
        mapped = jax.shard_map(decode, mesh=mesh, in_specs=(data, data, everywhere, data, data), out_specs=data)
    text = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize("what", ["widths", "float32", "scale", "pages"])
def test_what_the_kernel_refuses_is_left_to_xla(what):
    arguments = [jnp.asarray(x) for x in make_inputs(DecodeCase(1, 1, 1, 3))]
    if what == "widths":
        arguments[0], arguments[2] = arguments[0][..., :256], arguments[2][..., 256:]
    if what == "float32":
        arguments[:3] = [x.astype(jnp.float32) for x in arguments[:3]]
    if what == "pages":
        arguments[3] = jnp.zeros((1, 2**18 + 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="takes bfloat16 heads of 512|is not positive|takes 262144 pages"):
        mla_decode(*arguments, softmax_scale=-1.0 if what == "scale" else 1.0, implementation="pallas")
