"""The Flax modules: the functions and the tree under another face."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.config.load import load_config
from dsv3_jax.model.params import ParamSpec

TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


@pytest.fixture(scope="module")
def small(config):
    return config(num_layers=2)


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


def test_apply_is_forward_bit_for_bit(small, variables_of) -> None:
    variables, tokens = variables_of(small, seed=4), jax.random.randint(jax.random.key(1), (2, 11), 0, 67)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [4, 4, 3], axis=1))
    module = ds.DeepSeekV3(small)
    ours = jax.jit(module.apply)(variables, tokens, None, segment_ids)
    theirs = jax.jit(ds.forward, static_argnames="cfg")(small, variables, tokens, None, segment_ids)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
