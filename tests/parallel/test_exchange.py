"""Experts on many devices compute what they do on one, wherever tokens have to go."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.moe.experts import routed_experts
from dsv3_jax.parallel.axes import EXPERTS, ROWS
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.room import Room, copies_of_a_token, room_for
from dsv3_jax.training.exchanged import exchanged
from dsv3_kernels.varying import varying_over

pytestmark = pytest.mark.usefixtures("compile_quickly")

MOE = MoEConfig(num_experts=8, num_shared_experts=0, top_k=3, num_groups=2, groups_per_token=2, expert_dim=5)
B, T, D = 8, 6, 7
FEW = 0.7
"""A factor for which each of eight devices sends at most three of its six tokens to a peer at a time."""

MESHES: dict[str, dict[str, Any]] = {
    "one hop": {"expert": 4},
    "one hop, three tokens a peer": {"expert": 4, "capacity": FEW},
    "two hops": {"expert": 4, "expert_nodes": 2},
    "two hops, few tokens a peer": {"expert": 4, "expert_nodes": 2, "capacity": FEW},
    "one hop, three tokens a peer and no more": {"expert": 4, "capacity": FEW, "overflow": "drop"},
    "two hops, few tokens a peer and no more": {"expert": 4, "expert_nodes": 2, "capacity": FEW, "overflow": "drop"},
}
EXACT, DROPPING = list(MESHES)[:4], list(MESHES)[4:]
LONG = ("one hop, three tokens a peer", "two hops, few tokens a peer")
"""Slow to compile."""


def drawn(*, dim: int = D, width: int = MOE.expert_dim) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Parameters, tokens, weights."""
    rng = np.random.default_rng(7)
    E, K = MOE.num_experts, MOE.top_k
    params = {"gate_up": rng.normal(0, 0.5, (E, dim, 2, width)), "down": rng.normal(0, 0.5, (E, width, dim))}
    arrays = params, rng.normal(0, 1, (B, T, dim)), rng.uniform(0.1, 1, (B, T, K))
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), arrays)


def chosen(how: str) -> np.ndarray:
    """Experts of each token, some of them padding."""
    rng = np.random.default_rng(len(how))
    E, K = MOE.num_experts, MOE.top_k
    among = {"some experts have no tokens": (1, 2, 3, 6), "all on one peer": (2, 3)}.get(how, range(E))
    ids = np.stack([np.resize(rng.permutation(among), K) for _ in range(B * T)])
    if how == "all on one peer":
        ids[:, 2] = -1
    elif how == "one expert":
        ids = np.tile([5, -1, -1], (B * T, 1))
    elif how == "padding only":
        ids[:] = -1
    elif how == "padding":
        ids[rng.random(B * T) < 0.3] = -1
    return ids.reshape(B, T, K).astype(np.int32)


CHOICES = ("any", "padding", "some experts have no tokens", "all on one peer", "one expert", "padding only")


@functools.cache
def on_devices(name: str, precision: str = "float32") -> Any:
    """(params, x, weights, ids) -> (Σ result·target, (result, dropped)), gradients; compiled once for all ids."""
    parallel = ParallelConfig(**MESHES[name])
    mesh = make_mesh(parallel)
    settings: Any = {"capacity": parallel.capacity, "overflow": parallel.overflow}
    functions = exchanged(functions_for(precision), MOE, mesh, **settings)

    def of_a_device(params, x, weights, ids):
        params = varying_over(params, ROWS)
        settings: Any = {"functions": functions, "num_experts": MOE.num_experts}
        out, dropped = functions.routed_experts(params, x, ids, weights, **settings)
        return out, jax.lax.psum(dropped, ROWS)

    rows, by_expert = PartitionSpec(ROWS), PartitionSpec(EXPERTS)
    specs, results = (by_expert, rows, rows, rows), (rows, PartitionSpec())
    experts = jax.shard_map(of_a_device, mesh=mesh, in_specs=specs, out_specs=results, check_vma=True)
    return with_gradients(experts)


@functools.cache
def on_one_device(precision: str = "float32") -> Any:
    functions = functions_for(precision)
    settings: Any = {"functions": functions, "num_experts": MOE.num_experts}

    def experts(params, x, weights, ids):
        return routed_experts(params, x.astype(functions.compute_dtype), ids, weights, **settings)

    return with_gradients(experts)


def with_gradients(experts: Any) -> Any:
    def loss(params, x, weights, ids):
        out, dropped = experts(params, x, weights, ids)
        target = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out.astype(jnp.float32) * target).sum(), (out, dropped)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def error(ours: Any, theirs: Any) -> float:
    """The largest difference, by the largest entry of its array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    wide = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in wide)


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in EXACT]
)
def test_results_and_gradients_are_those_of_one_device(name, how):
    (params, x, weights), ids = drawn(), chosen(how)
    (_, (out, dropped)), gradients = on_devices(name)(params, x, weights, ids)
    (_, (expected, _)), expected_gradients = on_one_device()(params, x, weights, ids)
    assert int(dropped) == 0
    assert error(out, expected) <= 1e-6
    assert error(gradients, expected_gradients) <= 1e-5


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_is_counted(name, how):
    """A choice that no expert computed has no gradient of its weight, and is as if it had not been made."""
    (params, x, weights), ids = drawn(), chosen(how)
    (_, (out, dropped)), gradients = on_devices(name)(params, x, weights, ids)
    was_computed = np.asarray(gradients[2]) != 0
    assert int(dropped) == ((ids >= 0) & ~was_computed).sum()
    assert (int(dropped) > 0) == (how != "padding only")
    left = np.where(was_computed, ids, -1)
    (_, (expected, _)), expected_gradients = on_one_device()(params, x, weights, left)
    assert error((out, gradients), (expected, expected_gradients)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one hop", "two hops, few tokens a peer"])
def test_the_wire_of_fp8_adds_no_error(name):
    """Payloads are quantised again without loss; sums come home in bfloat16, and columns of tokens are others."""
    (params, x, weights), ids = drawn(dim=130, width=128), chosen("padding")
    exact, narrow = (on_one_device(precision)(params, x, weights, ids) for precision in ("float32", "fp8_dsv3"))
    found = on_devices(name, "fp8_dsv3")(params, x, weights, ids)

    def distances(result: Any) -> list[float]:
        arrays = jax.tree.leaves((result[0][1][0], result[1])), jax.tree.leaves((exact[0][1][0], exact[1]))
        wide = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(*arrays, strict=True)]
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in wide]

    for ours, theirs in zip(distances(found), distances(narrow), strict=True):
        assert 0 < ours <= 1.1 * theirs


def test_room_is_a_factor_of_the_mean():
    released = MoEConfig()
    assert copies_of_a_token(released, 8) == 4  # groups are nodes, of which a token may use four
    assert 7.6 < copies_of_a_token(released, 64) < 7.7
    assert room_for(4096, released, nodes=8, peers=8, capacity=None) == Room(4096, 8 * 4096, 64 * 4096 * 4)
    room = room_for(4096, released, nodes=8, peers=8, capacity=1.25)
    assert room == Room(2560, 4913, 40960)
    assert room_for(4096, released, nodes=1, peers=64, capacity=1e-9) == Room(1, 1, 1)
    assert room_for(6, MOE, nodes=1, peers=4, capacity=FEW).expert == 3
