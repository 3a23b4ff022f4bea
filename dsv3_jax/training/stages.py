"""A stage of the model in a pipeline: slots in turn, each attention and a feed-forward.

What only some stages do (dense layers, experts, MTP modules, nothing) stands in conditionals without collectives, and
all exchanges outside them: every rank takes part in every exchange, with no tokens where its slot has no experts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.layers import attention, feed_forward, rematerialised
from dsv3_jax.model.mla import Context
from dsv3_jax.model.moe.layer import choose
from dsv3_jax.model.mtp import join
from dsv3_jax.model.parts import ffn, rms_norm
from dsv3_jax.parallel.axes import TENSOR
from dsv3_jax.training.layout import IDLE, Layout
from dsv3_jax.typing import Array, Bool, Int, Params
from dsv3_kernels.varying import varying_over


class Around(NamedTuple):
    """What a stage reads beside parameters and activations."""

    kind: tuple[Int[Array, ""], ...]
    """Of each slot, as in `layout`."""
    biases: tuple[Array | None, ...]
    """Of each slot's router."""
    contexts: tuple[Context, ...]
    """Of each slot."""
    is_last: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The stages of a run on one device of a mesh: static values."""

    cfg: RunConfig
    """Of what one device computes: with its own heads."""
    layout: Layout
    on_mesh: Functions
    """Its `routed_experts` exchange tokens."""
    on_device: Functions
    """Nothing here communicates."""
    rows: tuple[str, ...]
    """Mesh axes over which activations vary."""
    everywhere: tuple[str, ...]
    """Those, and that of tensors where it splits widths."""

    @property
    def depth(self) -> int:
        return self.cfg.model.mtp_depth

    def __call__(self, slots: Any, norms: Any, embedded: Any, x: Array, around: Around) -> tuple[Any, Any]:
        """((states, balance losses), (loads, dropped)) of the slots in turn.

        States: what goes to the next stage; of the last stage what the head's norms read, one for each depth.
        """
        learned, states = [], []
        for index, params in enumerate(slots):
            module = index - (len(slots) - self.depth)
            given = (params, around.kind[index], around.biases[index], around.contexts[index], x)
            if module < 0:
                x, *of_router = self._saving(self._slot)(*given)
            else:
                states.append(x)
                of_module = norms[module], embedded[module], around.is_last
                x, *of_router = self._saving(self._module_slot)(*given, *of_module)
            learned.append(of_router)
        states.append(x)
        if self.depth:
            states[0] = jnp.where(around.is_last, states[0], x)
        balance, load, dropped = (jnp.stack(each) for each in zip(*learned, strict=True))
        return (tuple(states), balance), (load, dropped)

    def _saving(self, slot: Callable) -> Callable:
        return rematerialised(slot, self.cfg.train.remat)

    def _module_slot(self, params, kind, bias, ctx, x, norm, embedded, is_last) -> Any:
        """A slot that has an MTP module in the last stage; `norm` is that of what comes before."""
        settings: Any = {"cfg": self.cfg.model, "functions": self.on_device}

        def joined(x: Array, embedded: Array) -> Array:
            hidden = rms_norm(x, norm, eps=self.cfg.model.norm_eps)
            return join(params["mtp"], embedded, hidden, **settings)

        x = self.choose(is_last, joined, lambda x, _: x, x, embedded)
        return self._slot(params, kind, bias, ctx, x)

    def _slot(self, params: Params, kind: Array, bias: Array | None, ctx: Context, x: Array) -> Any:
        """x after a slot, and what its router learned."""
        cfg = self.cfg.model

        def attended(x: Array) -> Array:
            return attention(params["attention"], x, ctx, None, cfg=cfg, functions=self.on_device)[0]

        added = self._switch((kind != IDLE).astype(jnp.int32), [jnp.zeros_like, attended], x)
        x = checkpoint_name(x + self._whole(added), "mla_added")
        branches = [self._idle, partial(self._moe, params, bias, ctx)]
        if "mlp" in params:
            branches.append(partial(self._dense, params, ctx))
        added, sent, load, balance = self._switch(kind, branches, x)
        added, dropped = self._whole(added), jnp.int32(0)
        if "moe" in params:
            settings: Any = {"functions": self.on_mesh, "num_experts": cfg.moe.num_experts}
            routed, dropped = self.on_mesh.routed_experts(params["moe"]["experts"], *sent, **settings)
            added = routed + added
        return x + added, balance, load, varying_over(dropped, self.everywhere)

    def _idle(self, x: Array) -> tuple[Array, tuple[Array, Array, Array], Array, Array]:
        """What is added; what is sent to experts: none; their loads; the balance loss."""
        moe, zeros = self.cfg.model.moe, jnp.zeros_like(x)
        shape = (*x.shape[:2], moe.top_k)
        sent = zeros, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
        return zeros, sent, jnp.zeros(moe.num_experts, jnp.int32), jnp.float32(0)

    def _dense(self, params: Params, ctx: Context, x: Array) -> Any:
        """As `_idle`, of a dense feed-forward."""
        of_layer = {"ffn_norm": params["attention"]["ffn_norm"], "mlp": params["mlp"]}
        added, _ = feed_forward(of_layer, None, x, ctx, cfg=self.cfg.model, functions=self.on_device)
        return (added, *self._idle(x)[1:])

    def _moe(self, params: Params, bias: Array | None, ctx: Context, x: Array) -> Any:
        """As `_idle`, of experts: what the shared ones add, and what the routed ones get."""
        if "moe" not in params:
            return self._idle(x)
        cfg, moe, added = self.cfg.model, params["moe"], jnp.zeros_like(x)
        with jax.named_scope("feed_forward"):
            normed = rms_norm(x, params["attention"]["ffn_norm"]["scale"], eps=cfg.norm_eps)
            chosen, decided = choose(moe["router"], bias, normed, ctx.valid, cfg=cfg.moe, functions=self.on_device)
            if "shared" in moe:
                added = ffn(moe["shared"], normed, functions=self.on_device)
        sent = normed, chosen, decided.weights.reshape(chosen.shape)
        return added, sent, decided.load, decided.balance_loss

    def choose(self, condition: Array, true: Callable, false: Callable, *operands: Any) -> Any:
        """`lax.cond` of functions in which no device has only a part of a sum."""

        def typed(branch: Callable) -> Callable:
            return lambda *xs: varying_over(branch(*xs), self.rows)

        return lax.cond(condition, typed(true), typed(false), *operands)

    def _switch(self, index: Array, branches: Any, x: Array) -> Any:
        """`lax.switch` of functions that give a device's part of a sum over those that share heads or widths.

        x is typed as varying over them outside, or its gradient would be summed inside.
        """

        def typed(branch: Callable) -> Callable:
            return lambda x: varying_over(branch(x), self.everywhere)

        return lax.switch(index, [typed(branch) for branch in branches], varying_over(x, self.everywhere))

    def _whole(self, part: Array) -> Array:
        """The sum over devices that share heads or widths."""
        if TENSOR not in self.everywhere:
            return part
        return lax.psum(part.astype(jnp.float32), TENSOR).astype(part.dtype)
