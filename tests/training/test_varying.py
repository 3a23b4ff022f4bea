"""Loss and gradients of a batch that two devices share inside `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.model.functions import functions_for
from dsv3_jax.training.step import Denominators, batch_loss
from dsv3_kernels.varying import varying_as
from tests.small import make_variables

pytestmark = pytest.mark.usefixtures("compile_quickly")

SHARED, FIRST, SECOND = (jax.sharding.PartitionSpec(*names) for names in ((), ("data",), (None, "data")))


def batch_of(vocab_size: int, *, rows: int, seq_len: int, mtp_depth: int) -> Batch:
    """Two documents and some padding in each row."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab_size, (rows, seq_len + 1))
    ends = np.sort(rng.integers(2, seq_len + 1, (rows, 2)), axis=1)
    place = np.arange(seq_len + 1)[None, :]
    segments = np.where(place < ends[:, :1], 1, np.where(place < ends[:, 1:], 2, 0))
    return make_batch(tokens, segments, mtp_depth=mtp_depth)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("float32", 1e-5),
        # A device rounds its part of the gradient of a weight to bfloat16.
        pytest.param("mixed", 1e-2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1e-2, marks=pytest.mark.slow),
        # The operands of such a gradient share scales among 128 tokens, which are others on two devices than on one.
        pytest.param("fp8_dsv3", 5e-2, marks=pytest.mark.slow),
    ],
)
def test_two_devices_share_a_batch_and_add_up_to_one(precision, tolerance, repository):
    cfg = load_config(repository / "tests" / "training" / "midget.py", [f"precision={precision}"])
    functions = functions_for(precision)
    variables = make_variables(cfg.model, dtype=functions.param_dtype)
    batch = batch_of(cfg.model.vocab_size, rows=4, seq_len=cfg.train.seq_len, mtp_depth=cfg.model.mtp_depth)
    labels = jnp.asarray((batch.weights != 0).sum(axis=(1, 2)), jnp.float32)

    def sums(variables, batch, denominators):
        def loss(params):
            return batch_loss(params, variables["router_state"], batch, denominators, jnp.float32(0.3), cfg=cfg)

        (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, terms, gradients

    def of_a_device(variables, batch, denominators):
        return jax.lax.psum(sums(varying_as(variables, batch), batch, denominators), "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    specs = (SHARED, Batch(FIRST, SECOND, SECOND, FIRST, FIRST), SHARED)
    on_two = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=specs, out_specs=SHARED, check_vma=True))
    found = on_two(variables, batch, Denominators(labels, jnp.float32(2)))
    expected = jax.jit(sums)(variables, batch, Denominators(labels, jnp.float32(1)))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs), jax.tree_util.keystr(path)
