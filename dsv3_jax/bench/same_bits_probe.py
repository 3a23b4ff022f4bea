"""What `same_bits` compares, computed by whichever checkout is imported.

Reads nothing but the public contract, and what named a precision before `functions_for` did. Run as a script:
configuration, precision, file to write.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv3_jax as ds


def how(precision: str) -> dict[str, Any]:
    """The argument of `forward` and `generate` that chooses the arithmetic."""
    if hasattr(ds, "functions_for"):
        return {"functions": ds.functions_for(precision)}
    from dsv3_jax.precision import policy  # pyright: ignore

    return {"policy": policy.get_policy(precision)}


def drawn(cfg: ds.ModelConfig, dtype: Any) -> Any:
    """Weights that do not depend on how a checkout draws its own."""
    rng = np.random.default_rng(0)

    def draw(path: Any, spec: Any) -> jax.Array:
        normal = rng.standard_normal(spec.shape)
        is_norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(1 + 0.2 * normal if is_norm else cfg.init_std * normal, spec.dtype)

    specs = ds.abstract_params(cfg, dtype)
    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=lambda leaf: hasattr(leaf, "axes"))


def main(config: str, precision: str, out: str) -> None:
    """Writes logits, routing, gradients of every parameter, and generated ids."""
    cfg, settings, rng = ds.load_config(config).model, how(precision), np.random.default_rng(1)
    variables = drawn(cfg, next(iter(settings.values())).param_dtype)
    tokens = rng.integers(0, cfg.vocab_size, (4, 256)).astype(np.int32)
    mix = jnp.asarray(rng.standard_normal((4, 256, 8)), jnp.float32)

    def total(params: Any) -> Any:
        made = ds.forward(cfg, {**variables, "params": params}, tokens, **settings)
        mixed = [(logits[..., :8] * mix[:, : logits.shape[1]]).mean() for logits in (made.logits, *made.mtp_logits)]
        return sum(mixed), made

    (_, made), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
    found = {"logits": made.logits}
    found |= {f"router {name}": getattr(made.router, name) for name in ("ids", "weights", "load")}
    found |= {f"logits of MTP depth {k}": logits for k, logits in enumerate(made.mtp_logits, 1)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        found["gradient of " + "/".join(str(key.key) for key in path)] = leaf
    alone = jax.jit(lambda variables: ds.forward(cfg, variables, tokens, **settings).logits)
    found["logits without gradients"] = alone(variables)
    found["generated ids"] = ds.generate(cfg, variables, tokens[:, :33], 24, **settings)
    wide = {name: value.astype(np.float32) if value.dtype == jnp.bfloat16 else value for name, value in found.items()}
    arrays: Any = {name: np.asarray(value) for name, value in wide.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
