"""The weights that an engine computes with, and the check of those that replace them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.serving.fingerprint import fingerprint
from dsv3_jax.serving.programs import prepare
from dsv3_jax.typing import Variables


class Weights(NamedTuple):
    """One version of them."""

    variables: Any
    """As steps read them."""
    specs: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype of each leaf that was given, by its path."""
    fingerprint: bytes


def weights_of(cfg: ModelConfig, variables: Variables, *, functions: Functions) -> Weights:
    """`variables` made ready for steps."""
    return Weights(
        prepare(cfg, dict(variables), functions=functions),
        specs_of(variables),
        fingerprint(cfg, variables, functions=functions),
    )


def specs_of(variables: Variables) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (np.shape(leaf), str(jnp.result_type(leaf)))
        for path, leaf in leaves
    }


def check_same(weights: Weights, variables: Variables) -> None:
    """Refuses `variables` that are not of the tree, the shapes and the dtypes of `weights`."""
    new = specs_of(variables)
    for path, (shape, dtype) in weights.specs.items():
        check(path in new, f"the new weights lack {path}; give those of the same model (update_weights).")
        other_shape, other_dtype = new[path]
        check(
            (other_shape, other_dtype) == (shape, dtype),
            f"{path} is {other_dtype}{list(other_shape)} in the new weights and {dtype}{list(shape)} in the engine's; "
            "give those of the same model in the same dtype (update_weights).",
        )
    foreign = [path for path in new if path not in weights.specs]
    check(
        not foreign,
        f"the new weights hold {foreign[:1]}, which the engine's do not; give those of the same model "
        "(update_weights).",
    )
