"""Flax modules over the model's functions, for `init`, `apply`, `tabulate` or a network of your own.

Parameters are those of `model/tree.py`, boxed with its logical axes: `nn.get_partition_spec` reads them, `nn.unbox`
gives the plain tree. Router biases are in the collection "router_state", which no gradient reaches. `functions`: what a
layer is made of; None: those that compute in the parameters' dtype.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.model.mla import mla
from dsv3_jax.model.moe.layer import moe
from dsv3_jax.model.params import draw_leaf
from dsv3_jax.model.transformer import Output, context, forward
from dsv3_jax.model.tree import Leaf, Tree, mla_tree, model_tree, moe_tree, router_state_tree
from dsv3_jax.typing import Array, DType, Float, Int, Params


class DeepSeekV3(nn.Module):
    """The whole model: `apply` returns what `forward` returns, bit for bit."""

    cfg: ModelConfig
    param_dtype: DType = jnp.float32
    functions: Functions | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Output:
        tree = model_tree(self.cfg)
        params = _params(self, tree["params"])
        variables = {"params": params, "router_state": _router_state(self, tree["router_state"])}
        return forward(self.cfg, variables, tokens, positions, segment_ids, functions=self.functions)


class MLA(nn.Module):
    """Multi-head latent attention (eq. 1-11) of a network of your own; the norm before it is yours."""

    cfg: ModelConfig
    param_dtype: DType = jnp.float32
    functions: Functions | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        cfg, params = self.cfg, _params(self, mla_tree(self.cfg))
        functions = self.functions or functions_of(self.param_dtype)
        return mla(params, x, context(cfg, x.shape[:2], positions, segment_ids), cfg=cfg, functions=functions)[0]


class MoE(nn.Module):
    """Shared plus routed experts (eq. 12-16, without the residual) of a network of your own.

    Sows "load" [E] and "balance_loss" into "intermediates": what moving the bias, or a loss, needs.
    """

    cfg: ModelConfig
    param_dtype: DType = jnp.float32
    functions: Functions | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        params = _params(self, moe_tree(self.cfg))
        state = _router_state(self, router_state_tree(self.cfg) if self.cfg.moe.has_bias else {})
        bias = state["router"]["bias"] if state else None
        functions = self.functions or functions_of(self.param_dtype)
        added, routing = moe(params, bias, x, None, cfg=self.cfg.moe, functions=functions)
        self.sow("intermediates", "load", routing.load)
        self.sow("intermediates", "balance_loss", routing.balance_loss)
        return added


def _params(module: Any, tree: Tree) -> Params:
    """Declares the leaves of `tree` as parameters of `module`, boxed with their axes; their values, unboxed."""

    def fresh(key: jax.Array, subtree: Any) -> Any:
        def draw(path: Any, leaf: Leaf) -> nn.LogicallyPartitioned:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            value = draw_leaf(leaf, name, key, std=module.cfg.init_std, dtype=module.param_dtype)
            return nn.LogicallyPartitioned(value, leaf.axes)

        return jax.tree_util.tree_map_with_path(draw, subtree)

    return {name: module.param(name, fresh, subtree) for name, subtree in tree.items()}


def _router_state(module: nn.Module, tree: Tree) -> Params:
    def zeros(subtree: Any) -> Any:
        return jax.tree.map(lambda leaf: nn.LogicallyPartitioned(jnp.zeros(leaf.shape), leaf.axes), subtree)

    return {name: module.variable("router_state", name, zeros, subtree).value for name, subtree in tree.items()}
