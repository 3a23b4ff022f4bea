"""Flax modules over the model's functions, for `init`, `apply`, `tabulate` or a network of your own.

Parameters are those of `model/tree.py`, boxed with its logical axes: `nn.get_partition_spec` reads them, `nn.unbox`
gives the plain tree. Router biases are in the collection "router_state", which no gradient reaches. `functions`: what a
layer is made of, and the dtype of fresh parameters; None: float32, and what computes in the dtype of the parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.model.mla import mla
from dsv3_jax.model.moe.layer import moe
from dsv3_jax.model.params import draw
from dsv3_jax.model.transformer import Output, context, forward
from dsv3_jax.model.tree import Tree, mla_tree, model_tree, moe_tree, router_state_tree
from dsv3_jax.typing import Array, Float, Int, Params


class DeepSeekV3(nn.Module):
    """The whole model: `apply` returns what `forward` returns, bit for bit."""

    cfg: ModelConfig
    functions: Functions | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Output:
        tree = model_tree(self.cfg)
        params, router_state = _params(self, tree["params"]), _router_state(self, tree["router_state"])
        variables = {"params": params, "router_state": router_state}
        return forward(self.cfg, variables, tokens, positions, segment_ids, functions=self.functions)


class MLA(nn.Module):
    """Multi-head latent attention (eq. 1-11) of a network of your own; the norm before it is yours."""

    cfg: ModelConfig
    functions: Functions | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        params = _params(self, mla_tree(self.cfg))
        functions = self.functions or functions_of(params["out"].dtype)
        ctx = context(self.cfg, x.shape[:2], positions, segment_ids)
        return mla(params, x, ctx, cfg=self.cfg, functions=functions)[0]


class MoE(nn.Module):
    """Shared plus routed experts (eq. 12-16, without the residual) of a network of your own.

    Sows "load" [E] and "balance_loss" into "intermediates": what moving the bias, or a loss, needs.
    """

    cfg: ModelConfig
    functions: Functions | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        params = _params(self, moe_tree(self.cfg))
        state = _router_state(self, router_state_tree(self.cfg))
        functions = self.functions or functions_of(params["router"]["w"].dtype)
        bias = state["router"]["bias"] if state else None
        added, routing = moe(params, bias, x, None, cfg=self.cfg.moe, functions=functions)
        self.sow("intermediates", "load", routing.load)
        self.sow("intermediates", "balance_loss", routing.balance_loss)
        return added


def _params(module: Any, tree: Tree) -> Params:
    """Declares the leaves of `tree` as parameters of `module`, boxed with their axes; their values, unboxed."""
    dtype = module.functions.param_dtype if module.functions else jnp.float32

    def fresh(key: jax.Array, subtree: Any) -> Any:
        return _boxed(subtree, draw(subtree, key, std=module.cfg.init_std, dtype=dtype))

    return {name: module.param(name, fresh, subtree) for name, subtree in tree.items()}


def _router_state(module: nn.Module, tree: Tree) -> Params:
    def zeros(subtree: Any) -> Any:
        return _boxed(subtree, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), subtree))

    return {name: module.variable("router_state", name, zeros, subtree).value for name, subtree in tree.items()}


def _boxed(tree: Any, values: Any) -> Any:
    return jax.tree.map(lambda leaf, value: nn.LogicallyPartitioned(value, leaf.axes), tree, values)
