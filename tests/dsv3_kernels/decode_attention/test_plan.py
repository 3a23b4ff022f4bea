"""A plan that is made once for all layers: what it passes through, what is refused, and what a layer launches."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import dispatch, mla_decode, plan_decode
from dsv3_kernels.decode_attention.cases import SOFTMAX_SCALE, DecodeCase, make_inputs
from dsv3_kernels.decode_attention.planner import plan_splits

decode = functools.partial(mla_decode, softmax_scale=SOFTMAX_SCALE)
needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="jax older than the kernels need"
)
LENGTHS = (140, 3, 0, 65)
CASE = DecodeCase(len(LENGTHS), 2, 16, max(LENGTHS), given_lengths=LENGTHS)


@pytest.fixture(scope="module")
def inputs() -> list[jax.Array]:
    return [jnp.asarray(x) for x in make_inputs(CASE)]


@pytest.fixture(scope="module")
def alone(inputs) -> tuple[np.ndarray, np.ndarray]:
    """Results without a plan."""
    out, lse = jax.jit(decode)(*inputs)
    return np.asarray(out), np.asarray(lse)


def of_case(seq_lens: jax.Array, **options):
    return plan_decode(seq_lens, num_queries=CASE.num_queries, num_heads=CASE.num_heads, **options)


def test_plan_is_int32_arrays_of_sizes_that_no_length_changes(inputs):
    plan = of_case(inputs[-1], num_sms=7)
    twin = plan_splits(inputs[-1], num_parts=7)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(plan)] == [((4,), jnp.int32), ((7, 5), jnp.int32)]
    jax.tree.map(np.testing.assert_array_equal, plan, twin)
    planned = jax.jit(of_case)
    planned(inputs[-1])
    planned(inputs[-1] + 1)
    assert planned._cache_size() == 1


@pytest.mark.parametrize("form", ["reference", "xla"])
def test_lengths_of_the_plan_count(inputs, form):
    """Under jit those given beside it are not looked at, and what a table cannot hold is cut."""
    planned = jax.jit(functools.partial(decode, implementation=form))
    plan = of_case(inputs[-1] + jnp.array([1000, 0, -9, 0], jnp.int32))
    lengths = jnp.array([192, 3, 0, 65], jnp.int32)
    arrays = [*inputs[:2], jnp.nan_to_num(inputs[2]), inputs[3][:, :3]]
    expected = jax.jit(functools.partial(decode, implementation=form))(*arrays, lengths)
    jax.tree.map(np.testing.assert_array_equal, planned(*arrays, jnp.zeros_like(lengths), plan=plan), expected)


@pytest.mark.parametrize("way", ["jit", "scan", "shard_map", "donation"])
def test_plan_passes_through(inputs, alone, way):
    queries, rest = tuple(inputs[:2]), inputs[2:]
    plan = of_case(inputs[-1])
    if way == "jit":
        result = jax.jit(decode)(*inputs, plan=plan)
    elif way == "scan":

        def layer(plan, queries):
            return plan, decode(*queries, *rest, plan=plan)

        last, results = jax.lax.scan(layer, plan, jax.tree.map(lambda x: jnp.stack([x] * 3), queries))
        jax.tree.map(np.testing.assert_array_equal, last, plan)
        result = jax.tree.map(lambda x: x[2], results)
    elif way == "shard_map":
        types = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("data",), axis_types=types, devices=jax.devices()[:2])
        data, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

        def on_device(*inputs):
            return decode(*inputs, plan=of_case(inputs[-1]))

        result = jax.jit(
            jax.shard_map(on_device, mesh=mesh, in_specs=(data, data, everywhere, data, data), out_specs=data)
        )(*inputs)
    else:
        donating = jax.jit(lambda plan, *inputs: (decode(*inputs, plan=plan), plan), donate_argnums=0)
        result, passed = donating(jax.tree.map(jnp.copy, plan), *inputs)
        jax.tree.map(np.testing.assert_array_equal, passed, plan)
    for ours, theirs in zip(result, alone):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda lens: {"plan": of_case(lens[:3])}, "plan is of 3 sequences, and q_latent has 4; make it"),
        (lambda lens: {"plan": of_case(lens + 1)}, "made for other lengths than seq_lens; make it with .* every step"),
        (lambda lens: {"plan": of_case(lens, num_sms=133)}, r"133 parts, but 2 x 16 query rows a sequence have 132 on"),
        (lambda lens: {"plan": of_case(lens), "num_sms": 64}, "132 parts, but 2 x 16 query rows a sequence have 64 on"),
        (lambda lens: {"plan": of_case(lens), "num_sms": 0}, "num_sms=0 must be a positive integer"),
        (lambda lens: {"num_sms": 0}, "num_sms=0 of mla_decode must be a positive integer"),
    ],
    ids=["batch", "lengths", "parts", "contradicting", "plan-without-sms", "no-sms"],
)
def test_a_plan_that_does_not_fit_is_refused(inputs, wrong, message):
    with pytest.raises(ValueError, match=message):
        decode(*inputs, **wrong(inputs[-1]))


def test_a_plan_of_fewer_multiprocessors_fits(inputs, alone):
    for options in ({}, {"num_sms": 50}):
        result = decode(*inputs, plan=of_case(inputs[-1], num_sms=50), **options)
        np.testing.assert_array_equal(result[0], alone[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": jnp.zeros(3, jnp.int16)}, r"seq_lens is int16\[3\]; it must be int32 \[B\]"),
        ({"seq_lens": jnp.zeros(0, jnp.int32)}, r"seq_lens is int32\[0\]"),
        ({"num_queries": 0}, "num_queries=0 must be a positive integer"),
        ({"num_sms": -1}, "num_sms=-1 must be a positive integer"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_planned_is_refused(change, message):
    arguments = {"seq_lens": jnp.zeros(3, jnp.int32), "num_queries": 1, "num_heads": 16, **change}
    with pytest.raises(ValueError, match=message):
        plan_decode(arguments.pop("seq_lens"), **arguments)


@needs_pallas
def test_layers_in_line_are_two_kernels_each_and_views():
    from dsv3_kernels.decode_attention.pallas_step import layers_in_line

    found = operations(functools.partial(layers_in_line, num_layers=2), DecodeCase(2, 1, 16, 140, is_fp8=True))
    assert found.pop("custom_call") == 1 + 2 * 2
    assert set(found) == {"reshape", "bitcast_convert", "output_operand_alias"}


@needs_pallas
def test_a_loop_over_layers_adds_its_counter_and_the_layer_s_addition():
    from dsv3_kernels.decode_attention.pallas_step import layers_scanned

    found = operations(layers_scanned, DecodeCase(2, 2, 128, 140))
    assert found.pop("custom_call") == 1 + 2
    assert found.pop("add") == 2
    of_loop = {"while", "compare", "return", "constant", "broadcast_in_dim"}
    assert set(found) == {"reshape", "output_operand_alias", *of_loop}


def operations(function, case: DecodeCase) -> Counter[str]:
    text = jax.jit(function).trace(*case.shapes()).lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r"stablehlo\.(\w+)", text))


@needs_pallas
@pytest.mark.parametrize(("num_sms", "parts"), [(None, 33), (100, 25), (3, 1)])
def test_grids_show_the_multiprocessors(num_sms, parts):
    """Four blocks of rows, two of which share copies."""
    from dsv3_kernels.decode_attention.pallas_sm90 import mla_decode_pallas

    kernel = functools.partial(mla_decode_pallas, softmax_scale=SOFTMAX_SCALE, num_sms=num_sms)
    text = str(jax.make_jaxpr(kernel)(*DecodeCase(2, 2, 128, 140).shapes()))
    grids = re.findall(r"Mesh\(grid=\(([\d, ]+)\), .*?cluster=\(([\d, ]*)\)", text)
    assert grids == [(f"{parts},", ""), (f"{parts}, 2", "2,"), (f"{parts}, 64", "")]
