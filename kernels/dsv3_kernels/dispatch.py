"""Which implementation of an op a program holds: decided for the platform it is lowered for.

Every op takes `implementation=None | "reference" | "xla" | "pallas"`, as `jax.nn.dot_product_attention` does. A call
binds one primitive, and the primitive is lowered for the target: to the kernel on a Hopper GPU, to XLA's
implementation anywhere else, whatever device the process itself has. So a program exported for "cuda" on a laptop holds
the kernels, and one exported for "cpu" and "cuda" holds both.

What the primitive does for every op alike:
- its results have the types of the XLA implementation's (which mesh axes they vary over, how they are sharded), and the
  kernel, which knows nothing of meshes, is traced without them;
- differentiating it is refused, since the derivative of a rounding is no use and that of a kernel does not exist;
- under `jax.vmap` the XLA implementation is vectorised, and the kernel runs once for each element of the batch;
- a kernel that cannot take what it is given is replaced by the XLA implementation, which is logged.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from dsv3_kernels import explicit, target
from dsv3_kernels.derivative import NO_GRADIENT
from dsv3_kernels.target import OLDEST_PALLAS_JAX

LOGGER = logging.getLogger("dsv3_kernels")


@dataclasses.dataclass(frozen=True)
class Op:
    """An op: what it is called, its implementations, and what the kernel asks for. All take the same arguments."""

    name: str
    reference: Callable[..., Any]
    xla: Callable[..., Any]
    axes: str
    """Which axes of arguments and results are the same, such as "mk mk nk nk -> mn" (see `explicit`)."""
    kernel: Callable[..., Any] | None = None
    """For Hopper; imports Pallas when it is called, and takes `num_sms` where the op does."""
    refuses: Callable[..., str | None] = lambda *arrays, **static: None
    """Why the kernel cannot take these arguments, in words that name what to change; None if it can."""
    xla_gpu: Callable[..., Any] | None = None
    """In place of `xla` on GPUs."""
    no_gradient: str = NO_GRADIENT
    has_causal_mask: bool = False


class _Call(NamedTuple):
    """What is static of a call; hashable."""

    op: Op
    implementation: str | None
    num_sms: int | None
    static: tuple[tuple[str, Any], ...]


class _Flat(NamedTuple):
    """An implementation as a function of flat arguments, to flat results; hashable."""

    function: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    tree: Any

    def __call__(self, *flat: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(self.function(*jax.tree.unflatten(self.tree, flat), **dict(self.static)))


def run(op: Op, implementation: str | None, *arrays: Any, num_sms: int | None = None, **static: Any) -> Any:
    """Runs the op's implementation of that name; with None the kernel on Hopper GPUs, and XLA anywhere else.

    Args:
        arrays: arrays and trees of them, None where an optional one is absent.
        num_sms: how many multiprocessors a kernel may use; None for all.
        static: hashable arguments.
    Raises:
        ValueError: an unknown `implementation`, or `num_sms` below 1.
        NotImplementedError: `implementation="pallas"` where the kernel cannot take the arguments; when the program is
            lowered, where the target has no such kernels.
        TypeError: when it is differentiated.
    """
    _check(op, implementation, num_sms)
    call = _Call(op, implementation, num_sms, tuple(sorted(static.items())))
    if implementation in (None, "pallas") and op.kernel is not None:
        refusal = op.refuses(*arrays, **static)
        if refusal and implementation == "pallas":
            raise NotImplementedError(f'{op.name}(implementation="pallas"): {refusal}.')
        if refusal:
            if why_no_pallas() is None:
                _log(op.name, _shapes(arrays), refusal)
            return _bind(call, refusal, arrays)
    return _bind(call, None, arrays)


def why_no_pallas() -> str | None:
    """Why the Hopper kernels cannot run on this process's default device, or None if they can."""
    device = jax.devices()[0]
    if jax.__version_info__ >= OLDEST_PALLAS_JAX and device.platform != "gpu":
        return f"needs a Hopper GPU (compute capability 9.0), jax runs on {device.platform}"
    return target.why_no_kernels()


def _check(op: Op, implementation: str | None, num_sms: int | None) -> None:
    known = ["reference", "xla", *["pallas"] * (op.kernel is not None)]
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation={implementation!r} of {op.name} is unknown; use None, {', '.join(map(repr, known))}."
        )
    if num_sms is not None and (isinstance(num_sms, bool) or not isinstance(num_sms, int) or num_sms < 1):
        raise ValueError(f"num_sms={num_sms!r} of {op.name} must be a positive integer, or None for the whole GPU.")


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _bind(call: _Call, refusal: str | None, arrays: tuple[Any, ...]) -> Any:
    op, static = call.op, dict(call.static)
    plain = functools.partial(op.reference if call.implementation == "reference" else op.xla, **static)
    plain = explicit.partitioned(plain, op.axes, arrays)
    jaxpr, shapes = jax.make_jaxpr(plain, return_shape=True)(*arrays)
    flat, tree = jax.tree.flatten(arrays)
    of_gpu, kernel = None, None
    if call.implementation != "reference":
        of_gpu = _Flat(op.xla_gpu, call.static, tree) if op.xla_gpu else None
    if call.implementation in (None, "pallas") and op.kernel is not None:
        kernel = _Flat(op.kernel, call.static + (() if call.num_sms is None else (("num_sms", call.num_sms),)), tree)
    results = _op_p.bind(
        *flat,
        jaxpr=jaxpr,
        of_gpu=of_gpu,
        kernel=kernel,
        refusal=refusal,
        op=op,
        is_required=call.implementation == "pallas",
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


_op_p = Primitive("dsv3_kernels")
_op_p.multiple_results = True
# jax asks this of every primitive whose parameters hold a jaxpr, to lower types of its own that ours never has.
_op_p.is_high = lambda *_, **__: False


@_op_p.def_impl
def _run_now(*arrays, **params):
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_op_p.bind, **params))(*arrays)


@_op_p.def_abstract_eval
def _result_types(*_, jaxpr, **params):
    return jaxpr.out_avals


def _refuse_gradient(primals, tangents, *, op: Op, **params):
    raise TypeError(op.no_gradient.format(op=op.name))


def _batched(arrays, axes, *, jaxpr, of_gpu, kernel, **params):
    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=tuple(axes))

    results = _op_p.bind(
        *arrays,
        jaxpr=jax.make_jaxpr(mapped(jaxpr_as_fun(jaxpr)))(*arrays),
        of_gpu=of_gpu and mapped(of_gpu),
        kernel=kernel and _OneByOne(kernel, tuple(axes)),
        **params,
    )
    return results, [0] * len(results)


class _OneByOne(NamedTuple):
    """A kernel for each element of a batch, one after another."""

    kernel: Callable[..., Any]
    axes: tuple[int | None, ...]

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        moved = [x if axis is None else jax.numpy.moveaxis(x, axis, 0) for x, axis in zip(arrays, self.axes)]
        batched = [x for x, axis in zip(moved, self.axes) if axis is not None]

        def one(elements: list[jax.Array]) -> list[jax.Array]:
            rest = iter(elements)
            return self.kernel(*(x if axis is None else next(rest) for x, axis in zip(moved, self.axes)))

        return jax.lax.map(one, batched)


def _lower_plain(context, *arrays, jaxpr, op: Op, is_required: bool, **params):
    """For platforms without kernels."""
    if is_required:
        platform = "/".join(context.platforms or context.module_context.platforms)
        raise NotImplementedError(
            f'{op.name}(implementation="pallas") needs a Hopper GPU (compute capability 9.0), and the program is '
            f"compiled for {platform}; leave it None to run the XLA implementation."
        )
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(context, *arrays)


def _lower_for_gpu(context, *arrays, jaxpr, of_gpu, op: Op, **params):
    """For GPUs without kernels."""
    if of_gpu is None:
        return _lower_plain(context, *arrays, jaxpr=jaxpr, op=op, **params)
    return _lower_untyped(context, of_gpu, arrays)


def _lower_for_cuda(context, *arrays, jaxpr, of_gpu, kernel, refusal: str | None, op: Op, is_required: bool):
    if kernel is not None:
        obstacle = target.why_no_kernels(has_causal_mask=op.has_causal_mask)
        why = refusal or _why_not_divided(context)
        if is_required and (obstacle or why):
            raise NotImplementedError(
                f'{op.name}(implementation="pallas") {obstacle or why}; leave it None to run the XLA implementation.'
            )
        if obstacle is None and why is None:
            return _lower_untyped(context, kernel, arrays)
        if obstacle is None and why is not None:
            _log(op.name, _shapes(context.avals_in), why)
    return _lower_for_gpu(context, *arrays, jaxpr=jaxpr, of_gpu=of_gpu, op=op, is_required=False)


def _lower_untyped(context, function: Callable[..., Any], arrays):
    """A function that is traced as on one device: without the mesh axes that values vary over."""
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
    return mlir.lower_fun(function, multiple_results=True)(context.replace(avals_in=plain), *arrays)


def _why_not_divided(context) -> str | None:
    """Why XLA would have to divide a kernel among devices, which it cannot; None inside shard_map or on one device."""
    axes = context.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        rest = [name for name, size in axes.mesh.shape.items() if size > 1 and name not in axes.manual_axes]
        return (
            f"is divided over mesh axes {rest} by XLA, which cannot divide a kernel: make them manual" if rest else None
        )
    if getattr(axes, "num_devices", None) in (None, 1):
        return None
    return (
        f"is in a program of {axes.num_devices} devices, and XLA cannot divide a kernel: call it inside jax.shard_map"
    )


def _shapes(arrays: Any) -> str:
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(arrays))


@functools.cache
def _log(op: str, shapes: str, why: str) -> None:
    """Once for an op, its shapes and a reason."""
    LOGGER.warning("%s(%s) runs in XLA, not in its Hopper kernel: %s.", op, shapes, why)


ad.primitive_jvps[_op_p] = _refuse_gradient
batching.primitive_batchers[_op_p] = _batched
mlir.register_lowering(_op_p, _lower_plain)
mlir.register_lowering(_op_p, _lower_for_gpu, platform="rocm")
mlir.register_lowering(_op_p, _lower_for_cuda, platform="cuda")
