"""What a device is said to hold is what the model's own layers save, and what its state is split into."""

import collections
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config.load import load_config, override
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.layers import layer, rematerialised
from dsv3_jax.model.mla import Context
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.model.rope import RopeTable
from dsv3_jax.parallel.mesh import make_mesh, mesh_shape
from dsv3_jax.planning.fit import main, plan_text
from dsv3_jax.planning.held import GRADIENTS, MASTERS, MOMENTS, SAVED, copies, held
from dsv3_jax.planning.memory import Tensor, traced
from dsv3_jax.planning.nearest import nearest
from dsv3_jax.planning.saved import Work, saved_by_layer, work_of
from dsv3_jax.training.sharded import on_mesh
from dsv3_jax.training.state import abstract_state, state_shardings
from dsv3_kernels.varying import varying_over

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, LARGE = load_config(CONFIGS / "tiny.py"), load_config(CONFIGS / "dsv3_671b.py")
ALL_671B = 682_636_487_424


@pytest.mark.parametrize("precision", ["mixed", "fp8_dsv3"])
@pytest.mark.parametrize("is_moe", [False, True], ids=["dense", "moe"])
def test_the_table_of_saved_tensors_is_the_trace(precision, is_moe):
    found = traced(TINY.model, functions_for(precision), rows=3, seq_len=50, is_moe=is_moe)
    named = collections.Counter()
    for name, tensor in found.named:
        named[name] += tensor.size
    work = Work(150, (), 150 * TINY.model.moe.top_k, TINY.model.moe.num_experts, has_rounds=False)
    assert collections.Counter(saved_by_layer(TINY.model, precision, work, is_moe=is_moe)) == named


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp8_dsv3", "parallel.expert=4 parallel.expert_nodes=2 parallel.capacity=1.25"),
        ("mixed", "parallel.expert=4 parallel.capacity=1 parallel.overflow=drop"),
        ("mixed", "parallel.expert=2 parallel.expert_nodes=2"),
    ],
)
def test_the_table_counts_what_an_exchange_receives(precision, changes):
    rows = [f"train.batch.{name}=8" for name in ("micro", "start", "full")]
    cfg = override(TINY, [f"precision={precision}", *rows, "train.seq_len=64", *changes.split()])
    mesh = make_mesh(cfg.parallel)
    work = work_of(cfg, mesh)
    saved = sum(saved_by_layer(cfg.model, precision, work, is_moe=True).values())
    assert saved == _held_by_a_layer(cfg, mesh, rows=work.tokens // 64)


def test_stored_bytes_are_those_of_the_state():
    cfg = override(TINY, ["parallel.expert=4", "precision=fp8_dsv3"])
    mesh = make_mesh(cfg.parallel)
    shape = dict(mesh.shape)
    counted, state, shardings = held(cfg, shape), abstract_state(cfg), state_shardings(cfg, mesh)

    def on_device(tree, shardings):
        sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, tree, shardings)
        return sum(jax.tree.leaves(sizes))

    assert counted.of(MASTERS) == on_device(state.params, shardings.params)
    assert counted.of(MOMENTS) == on_device(state.opt_state, shardings.opt_state)
    extra = sum(one.elements for one in copies(cfg, shape))
    biases = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.router_state))
    stored = 8 * (counted.of(MASTERS) // 4 + biases)
    assert stored == counted.parameters + extra


def test_the_released_model_fits_as_planned():
    shape = mesh_shape(LARGE.parallel, 2048)
    counted = held(LARGE, shape)
    assert counted.parameters == ALL_671B
    assert counted.total < 80e9
    biases = (LARGE.model.num_moe_layers + LARGE.model.mtp_depth) * LARGE.model.moe.num_experts
    stored = 2048 * (counted.of(MASTERS) // 4 + biases)
    assert stored == ALL_671B + sum(one.elements for one in copies(LARGE, shape))


@pytest.mark.parametrize(
    ("change", "name"),
    [("precision=mixed", SAVED), ("parallel.schedule=dualpipe", GRADIENTS)],
)
def test_what_does_not_fit_names_the_class_that_does_it(change, name, capsys: pytest.CaptureFixture[str]):
    assert main([str(CONFIGS / "dsv3_671b.py"), "--set", change]) == 0
    text = capsys.readouterr().out
    assert "80 GB do not hold it" in text
    key, _, _ = change.partition("=")
    (back,) = [line for line in text.splitlines() if line.startswith(f"  --set {key}=")]
    assert f"most by {name}" in back


def test_a_plan_names_axes_classes_and_memories():
    text = plan_text(
        dataclasses.replace(TINY, name="small"), mesh_shape(override(TINY, ["parallel.expert=2"]).parallel, 4)
    )
    for said in ("small, float32, 4 devices", "expert       2", "stored masters", "80 GB hold it", "144 copies"):
        assert said in text


def test_a_plan_is_come_to_by_setting_all_that_it_names():
    """Rows of a micro-batch and replicas follow from the axes."""
    cfg = load_config(CONFIGS / "v2_lite_16b.py", ["precision=mixed", "train.batch.micro=64", "parallel.data=16"])
    plans = nearest(cfg, mesh_shape(cfg.parallel, 16), 80 * 10**9)
    assert {"parallel.tensor": 2, "train.batch.micro": 32, "parallel.data": 8} in [plan.changes for plan in plans]
    for plan in plans:
        changed = override(cfg, [f"{key}={value}" for key, value in plan.changes.items()])
        assert held(changed, mesh_shape(changed.parallel, 16)) == plan.held


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices=0"], "--devices 0"),
        (["--devices=6", "--set", "parallel.expert=4"], "expert 4"),
        (["--devices=64"], "train.batch.micro=8"),
    ],
)
def test_errors_are_clear(arguments, said, capsys: pytest.CaptureFixture[str]):
    assert main([str(CONFIGS / "tiny.py"), *arguments]) == 2
    assert said in capsys.readouterr().err


def _held_by_a_layer(cfg, mesh, *, rows):
    """Bytes that the backward pass of an MoE layer holds on one device, beside what it was given."""
    model, functions = cfg.model, functions_for(cfg.precision)
    of_mesh, held = on_mesh(functions, cfg, mesh), []
    peers = mesh.shape["node"] * mesh.shape["expert"]

    def own(path, spec):
        shape = list(spec.shape[1:])
        if any(key.key == "experts" for key in path):
            shape[0] //= peers
        return jax.ShapeDtypeStruct(shape, spec.dtype)

    specs = abstract_params(model, functions.param_dtype)["params"]["moe_layers"]
    params = jax.tree_util.tree_map_with_path(own, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    bias = jax.ShapeDtypeStruct((model.moe.num_experts,), jnp.float32)
    angles = jax.ShapeDtypeStruct((rows, cfg.train.seq_len, model.mla.rope_head_dim // 2), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, cfg.train.seq_len, model.model_dim), functions.compute_dtype)

    def body(*given):
        given = varying_over(given, ("data", "node", "expert"))
        params, bias, angles, x = given

        def step(params, x):
            x, _, routing = layer(params, bias, x, Context(RopeTable(angles, angles)), cfg=model, functions=of_mesh)
            assert routing is not None
            return x, routing.balance_loss

        pull = jax.vjp(rematerialised(step, "paper"), params, x)[1]
        known = collections.Counter(map(_tensor, jax.tree.leaves((params, bias, angles, angles))))
        held.append(collections.Counter(map(_tensor, jax.tree.leaves(pull))) - known)
        return jnp.zeros(())

    none = PartitionSpec()
    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=(none,) * 4, out_specs=none), params, bias, angles, x)
    return sum(tensor.size * count for tensor, count in held[0].items())


def _tensor(leaf):
    return Tensor(leaf.shape, str(leaf.dtype))
