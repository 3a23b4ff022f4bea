"""The Flax modules: the functions and the tree under another face."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.config.load import load_config
from dsv3_jax.interop.hf_names import flatten
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import ParamSpec
from dsv3_jax.model.tree import mla_tree, moe_tree
from tests.small import make_config, make_variables

TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


SMALL = make_config(num_layers=2)

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("name", ["tiny", "bench_30m", "v2_lite_16b", "dsv3_671b"])
def test_variables_and_axes_are_those_of_the_table(repository, name: str) -> None:
    cfg = load_config(repository / "configs" / f"{name}.py").model
    boxed = jax.eval_shape(ds.DeepSeekV3(cfg).init, jax.random.key(0), TOKENS)
    expected = {name: tree for name, tree in ds.abstract_params(cfg).items() if tree}

    def is_spec(leaf) -> bool:
        return isinstance(leaf, ParamSpec)

    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nn.unbox(boxed))
    assert shapes == jax.tree.map(lambda spec: (spec.shape, spec.dtype), expected, is_leaf=is_spec)
    axes = jax.tree.map(lambda spec: jax.sharding.PartitionSpec(*spec.axes), expected, is_leaf=is_spec)
    assert nn.get_partition_spec(boxed) == axes


def test_apply_is_forward_bit_for_bit() -> None:
    variables, tokens = make_variables(SMALL, seed=4), jax.random.randint(jax.random.key(1), (2, 11), 0, 67)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [4, 4, 3], axis=1))
    module = ds.DeepSeekV3(SMALL)
    ours = jax.jit(module.apply)(variables, tokens, None, segment_ids)
    theirs = jax.jit(ds.forward, static_argnames="cfg")(SMALL, variables, tokens, None, segment_ids)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Network(nn.Module):
    """A user's own: one layer between two projections of his, over the public modules."""

    cfg: ds.ModelConfig
    functions: object = None

    @nn.compact
    def __call__(self, x, segment_ids=None):
        x = nn.Dense(self.cfg.model_dim, use_bias=False, dtype=x.dtype, name="into")(x)
        x = x + ds.MLA(self.cfg, self.functions, name="attention")(x, None, segment_ids)
        x = x + ds.MoE(self.cfg, self.functions, name="experts")(x)
        return nn.Dense(3, use_bias=False, dtype=x.dtype, name="out")(x)


def test_attention_and_experts_work_in_a_network_of_ones_own() -> None:
    """Parameters beside the network's own, gradients to all of them, none to the bias, loads for who asks."""
    network, x = Network(SMALL), jax.random.normal(jax.random.key(1), (2, 9, 5))
    rng, fresh = np.random.default_rng(0), nn.unbox(jax.eval_shape(network.init, jax.random.key(0), x))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), fresh)
    table = {"attention": mla_tree(SMALL), "experts": moe_tree(SMALL)}
    shapes = jax.tree.map(lambda leaf: leaf.shape, {name: variables["params"][name] for name in table})
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, table)
    assert jax.tree.map(jnp.shape, variables["router_state"]) == {"experts": {"router": {"bias": (6,)}}}

    @jax.jit
    def run(params):
        def loss(params):
            y, sown = network.apply({**variables, "params": params}, x, mutable=["intermediates"])
            return jnp.square(y).sum(), sown["intermediates"]["experts"]

        return jax.grad(loss, has_aux=True)(params)

    grads, sown = run(variables["params"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)
    assert int(sown["load"][0].sum()) == 2 * 9 * SMALL.moe.top_k
    assert float(sown["balance_loss"][0]) > 0


def test_functions_decide_the_dtype_of_fresh_parameters() -> None:
    network = Network(SMALL, functions_for("bfloat16"))
    fresh = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4, 5), jnp.bfloat16)))
    ours = {name: fresh["params"][name] for name in ("attention", "experts")}
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    assert fresh["router_state"]["experts"]["router"]["bias"].dtype == jnp.float32


def test_tabulate_lists_every_parameter() -> None:
    table = ds.DeepSeekV3(SMALL).tabulate(
        jax.random.key(0), jnp.zeros((1, 4), jnp.int32), console_kwargs={"width": 200}
    )
    count = sum(math.prod(spec.shape) for spec in flatten(ds.abstract_params(SMALL)).values())
    assert f"{count:,}" in table
    for path in flatten(ds.abstract_params(SMALL)):
        assert path.split("/")[-1] in table
