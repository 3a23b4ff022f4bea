"""What an exchange between nodes moves at the sizes of the released model, read off the compiled program."""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.layers import rematerialised
from dsv3_jax.parallel.axes import EXPERTS, ROWS
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.exchanged import exchanged
from dsv3_kernels.varying import varying_over

pytestmark = pytest.mark.usefixtures("compile_quickly")

RELEASED, D, NODES, CAPACITY = MoEConfig(), 7168, 8, 1.25
TOKENS = 64
"""Of a device; what is read is bytes a token."""
PAYLOAD = D + D // 128


@pytest.fixture(scope="module")
def lowered() -> Any:
    """Forward and backward pass of a rematerialised layer's routed experts, whose own arithmetic is cut short."""

    def short_ffn(gate_up, down, sent):
        return jnp.sin(sent.rows) * sent.weights.astype(jnp.bfloat16)[:, None] * down[0, 0, 0].astype(jnp.bfloat16)

    mesh = make_mesh(ParallelConfig(expert=NODES, expert_nodes=NODES))
    functions = dataclasses.replace(functions_for("fp8_dsv3"), expert_ffn=short_ffn)
    functions = exchanged(functions, RELEASED, mesh, capacity=CAPACITY, overflow="drop")

    def of_a_device(params, x, weights, ids):
        def layer(params, x):
            settings: Any = {"functions": functions, "num_experts": RELEASED.num_experts}
            return functions.routed_experts(params, jnp.sin(x), ids, weights, **settings)[0]

        return rematerialised(layer, "paper")(varying_over(params, ROWS), x)

    rows, by_expert = PartitionSpec(ROWS), PartitionSpec(EXPERTS)
    specs = (by_expert, rows, rows, rows)
    experts = jax.shard_map(of_a_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=True)

    def loss(params, x, weights, ids):
        return (experts(params, x, weights, ids).astype(jnp.float32) ** 2).sum()

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    E, F, K = RELEASED.num_experts, RELEASED.expert_dim, RELEASED.top_k
    params = {"gate_up": array(E, D, 2, F), "down": array(E, F, D)}
    x, weights = array(NODES, TOKENS, D, dtype=jnp.bfloat16), array(NODES, TOKENS, K)
    ids = array(NODES, TOKENS, K, dtype=jnp.int32)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(params, x, weights, ids)


def test_a_token_goes_once_to_a_node_in_eight_bits(lowered):
    """Bytes that a device sends in a round, by kind of array."""
    bits = {"u8": 8, "s32": 32, "f32": 32}
    sent: Counter[tuple[str, int]] = Counter()
    calls: Counter[tuple[str, int]] = Counter()
    for result in re.findall(r"= (\(?\w+\[.*?) all-to-all\(", lowered.compile().as_text()):
        slabs = [(dtype, shape.split(",")) for dtype, shape in re.findall(r"(\w+)\[(.*?)\]", result)]
        for dtype, sizes in slabs:
            sent[dtype, int(sizes[-1])] += math.prod(map(int, sizes)) * bits[dtype] // 8 // TOKENS
        calls[slabs[0][0], int(slabs[0][1][-1])] += 1
    nodes_of_a_token = RELEASED.groups_per_token
    # Out as a payload and home as a sum, then the gradient home as a payload and out as a sum: nothing a second time.
    # XLA on CPU sends float32 where bfloat16 is asked for.
    assert calls == {("u8", D): 2, ("u8", D // 128): 2, ("f32", D): 2, ("s32", 8): 1, ("f32", 8): 2}
    one_way = (sent["u8", D] + sent["u8", D // 128]) / 2
    assert one_way == CAPACITY * nodes_of_a_token * PAYLOAD
    assert one_way == CAPACITY * RELEASED.top_k * PAYLOAD / 2
    leaves = (NODES - 1) / NODES  # one of the slabs stays
    assert leaves * (one_way + sent["s32", 8] + sent["f32", 8] / 2) < CAPACITY * nodes_of_a_token * PAYLOAD


def test_sums_come_home_in_bfloat16(lowered):
    asked = re.findall(rf"all_to_all.*-> tensor<\d+x{D}x(\w+)>", lowered.as_text())
    assert set(asked) == {"ui8", "bf16"}
