"""What tells one model's latents from another's: a digest of its configuration, its dtypes and its weights."""

import hashlib
import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.typing import Array, UInt, Variables

FORMAT_VERSION = 1
"""Of the rows of a page: a change of what they hold is another version."""


def fingerprint(cfg: ModelConfig, variables: Variables, *, functions: Functions) -> bytes:
    """SHA-256 of whatever the rows of a page depend on besides the tokens; weights are summed on the device."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    sums = np.asarray(_checksums([leaf for _, leaf in leaves]))
    named = [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape) for path, leaf in leaves]
    told = [FORMAT_VERSION, asdict(cfg), functions.name, str(jnp.dtype(functions.compute_dtype)), named]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + sums.astype("<u4").tobytes()).digest()


@jax.jit
def _checksums(leaves: list[Array]) -> UInt[Array, "n"]:
    """The sum of each leaf's bits modulo 2^32, weighted by the place."""
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: Array) -> UInt[Array, ""]:
    of_size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, of_size).astype(jnp.uint32).reshape(-1)
    places = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1  # odd, so that no change of one element is lost
    return (bits * places).sum(dtype=jnp.uint32)
