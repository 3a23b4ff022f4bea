"""Loss and gradients of a micro-batch that a mesh shares: one manual `jax.shard_map` over all axes of the mesh.

Inside it the model's functions run as they are, on a device's own rows and a device's own part of the weights. What
they do not know of stands around them: `gathered` brings a parameter from how it is stored to how it is used,
`exchanged` sends tokens to their experts, `tensor_split` adds up what devices that share a width have made.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.parallel.axes import PIPE, ROWS, TENSOR
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.parallel.sharding import store
from dsv3_jax.training.batches import batch_specs, place
from dsv3_jax.training.exchanged import exchanged
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import Denominators, Gradients, Rates, Sums, batch_loss
from dsv3_jax.typing import Array, DType, Float, Params, Variables
from dsv3_kernels.varying import varying_as, varying_axes, varying_over


def sharded_gradients(
    cfg: RunConfig, mesh: Mesh, functions: Functions, loss: Callable[..., Any] = batch_loss
) -> Gradients:
    """The twin of `step.gradients_of` on a mesh without a pipeline; gradients lie as the state is stored.

    Each device takes its own rows and differentiates with regard to its own part of what is stored; the transpose of
    `gathered` adds up gradients, once, outside all loops.
    """
    specs = abstract_params(cfg.model)["params"]
    rows = used_axes(mesh, ROWS)
    local_cfg, local_functions = local_config(cfg, mesh), on_mesh(functions, cfg, mesh)
    gather = functools.partial(gathered_tree, mesh=mesh, rows=rows, functions=functions)

    def local_loss(params, router_state, batch, denominators, mtp_weight):
        used, of_layer = _in_use(params, specs, gather, by_layer=cfg.parallel.gather == "layer")
        share = denominators._replace(micro_batches=denominators.micro_batches * size_of(mesh, rows))
        arguments = used, router_state, batch, share, mtp_weight
        return loss(*arguments, cfg=local_cfg, functions=local_functions, of_layer=of_layer)

    def of_a_device(*arguments):
        value_and_terms, grads = jax.value_and_grad(local_loss, has_aux=True)(*arguments)
        value, terms = summed(value_and_terms, rows)
        return Sums(value, terms, jax.tree.map(lambda g: g.astype(jnp.float32), grads))

    stored = stored_specs(specs, mesh)
    whole: Any = PartitionSpec()

    def gradients(state: TrainState, batch: Batch, denominators: Denominators, rates: Rates) -> Sums:
        manual = jax.shard_map(
            of_a_device,
            mesh=mesh,
            in_specs=(stored, whole, batch_specs(batch, rows), whole, whole),
            out_specs=Sums(whole, whole, stored),
            check_vma=True,
        )
        return manual(state.params, state.router_state, batch, denominators, rates.mtp_weight)

    return gradients


def sharded_evaluator(cfg: RunConfig, mesh: Mesh, functions: Functions) -> Callable[[Variables, Batch], Array]:
    """The twin of `evaluate.make_evaluator` on a mesh: rows are split over the ranks of a pipeline, too.

    A batch holds the rows of this process; rows that are missing to a multiple of the devices are padding.
    """
    specs = abstract_params(cfg.model)["params"]
    rows = used_axes(mesh, (PIPE, *ROWS))
    local_cfg, local_functions = local_config(cfg, mesh), on_mesh(functions, cfg, mesh)
    gather = functools.partial(gathered_tree, mesh=mesh, rows=rows, functions=functions)

    def of_a_device(params, router_state, batch):
        used, of_layer = _in_use(params, specs, gather, by_layer=True)
        variables = {"params": used, "router_state": router_state}
        settings: Any = {"functions": local_functions, "of_layer": of_layer, "with_mtp": False}
        inputs = batch.tokens, batch.positions, batch.segment_ids
        states = hidden_states(local_cfg.model, variables, *inputs, **settings)
        head, labels, weights = used["unembed"]["w"], batch.labels[0], batch.weights[0]
        return summed(next_token_loss(states.hidden, head, labels, weights, chunk_size=cfg.train.loss_chunk_size), rows)

    whole = PartitionSpec()

    @jax.jit
    def on_mesh_batch(variables: Variables, batch: Batch) -> Float[Array, ""]:
        in_specs = stored_specs(specs, mesh), whole, batch_specs(batch, rows)
        manual = jax.shard_map(of_a_device, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=True)
        return manual(variables["params"], variables["router_state"], batch)

    def sum_loss(variables: Variables, batch: Batch) -> Float[Array, ""]:
        return on_mesh_batch(variables, place(batch, mesh, rows))

    return sum_loss


def stored_specs(specs: Params, mesh: Mesh) -> Params:
    """The `PartitionSpec` of each parameter between steps, from the tree of `abstract_params`."""
    return jax.tree.map(lambda spec: store(spec, mesh).spec, specs, is_leaf=_is_spec)


def used_axes(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` along which the mesh has several devices."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def summed(tree: Any, axes: tuple[str, ...]) -> Any:
    """Every array of `tree` summed over the devices of `axes`."""
    return lax.psum(varying_over(tree, axes), axes) if axes else tree


def local_config(cfg: RunConfig, mesh: Mesh) -> RunConfig:
    """The configuration of what one device computes: its own heads, and no mesh."""
    mla = cfg.model.mla
    mla = dataclasses.replace(mla, num_heads=mla.num_heads // mesh.shape[TENSOR])
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mla=mla), parallel=ParallelConfig())


def on_mesh(functions: Functions, cfg: RunConfig, mesh: Mesh) -> Functions:
    """`functions` with what a mesh puts around them."""
    parallel = cfg.parallel
    functions = exchanged(functions, cfg.model.moe, mesh, capacity=parallel.capacity, overflow=parallel.overflow)
    return tensor_split(functions) if mesh.shape[TENSOR] > 1 else functions


def tensor_split(functions: Functions) -> Functions:
    """`functions` for weights of which each device of the tensor axis has some heads, or a part of a width.

    What closes such a part, W^O and both kinds of W_down, is summed over the devices, in float32.
    """

    def whole(x: Array) -> Array:
        return lax.psum(x.astype(jnp.float32), TENSOR).astype(x.dtype) if TENSOR in varying_axes(x) else x

    def opening(x: Array, w: Array) -> Array:
        return functions.project(varying_as(x, w), w)

    def closing(project: Callable[..., Array]) -> Callable[..., Array]:
        return lambda x, w: whole(project(varying_as(x, w), w))

    def routed_experts(params: Params, x: Array, ids: Array, weights: Array, **settings: Any) -> tuple[Array, Array]:
        out, dropped = functions.routed_experts(params, *varying_over((x, ids, weights), (TENSOR,)), **settings)
        return whole(out), lax.pmax(varying_over(dropped, (TENSOR,)), TENSOR)

    return dataclasses.replace(
        functions,
        project=opening,
        project_attended=closing(functions.project_attended),
        project_swiglu=closing(functions.project_swiglu),
        routed_experts=routed_experts,
    )


def gathered_tree(
    tree: Params, specs: Params, *, mesh: Mesh, rows: tuple[str, ...], functions: Functions, of_layer: bool = False
) -> Params:
    """Stored parameters as they are used: whole but for experts, heads and widths, in the dtype of their use.

    `of_layer`: `tree` is one layer of the stack that `specs` describe.
    """

    def bring(path: Any, spec: ParamSpec, leaf: Array) -> Array:
        stored = store(spec, mesh)
        gathers = tuple((dim - of_layer, axes) for dim, axes in stored.gathers)
        return gathered(leaf, gathers, rows, dtype_of_use(path, spec, functions))

    return jax.tree_util.tree_map_with_path(bring, specs, tree, is_leaf=_is_spec)


def dtype_of_use(path: Any, spec: ParamSpec, functions: Functions) -> DType:
    """Matrices are used in the compute dtype. Norms and the router compute in float32, and take what is stored."""
    is_matrix = sum(axis != "layers" for axis in spec.axes) >= 2
    is_router = any(getattr(key, "key", None) == "router" for key in path)
    return jnp.dtype(functions.compute_dtype if is_matrix and not is_router else functions.param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(leaf: Array, gathers: Any, rows: tuple[str, ...], dtype: DType) -> Array:
    """A stored parameter in `dtype`, gathered over `gathers` and typed as varying over the axes `rows`.

    `gathers`: (dimension, mesh axes) as in `sharding.Stored`. Its gradient is summed over the devices that share the
    parameter and split as it is stored, in float32.
    """
    leaf = leaf.astype(dtype)
    for dim, axes in gathers:
        leaf = lax.all_gather(leaf, axes, axis=dim, tiled=True)
    return varying_over(leaf, rows)


def _gathered_forward(leaf, gathers, rows, dtype):
    return gathered(leaf, gathers, rows, dtype), leaf


def _gathered_backward(gathers, rows, dtype, leaf, d_used):
    total = d_used.astype(jnp.float32)
    scattered = {axis for _, axes in gathers for axis in axes}
    shared = tuple(axis for axis in varying_axes(d_used) if axis not in scattered and axis not in varying_axes(leaf))
    total = lax.psum(total, shared) if shared else total
    for dim, axes in reversed(gathers):
        total = lax.psum_scatter(total, axes, scatter_dimension=dim, tiled=True)
    return (total.astype(leaf.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def _in_use(params: Params, specs: Params, gather: Callable[..., Params], *, by_layer: bool) -> tuple[Params, Callable]:
    """Parameters for `hidden_states`, and its `of_layer`: stacks are gathered at once, or layer by layer."""
    stacks = ("dense_layers", "moe_layers", "mtp") if by_layer else ()
    used = {name: tree if name in stacks else gather(tree, specs[name]) for name, tree in params.items()}

    def of_layer(layer: Params) -> Params:
        name = "mtp" if "block" in layer else "dense_layers" if "mlp" in layer else "moe_layers"
        return gather(layer, specs[name], of_layer=True)

    return used, of_layer if by_layer else lambda layer: layer


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)
