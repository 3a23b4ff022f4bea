"""Exponential moving average of the parameters, on the host and off the critical path (report section 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.check import UserError
from dsv3_jax.typing import Params


class HostEMA:
    """Averages parameters in float32 NumPy arrays: the n-th update weighs (1 - decay) · decay^k if k followed it.

    The weights are divided by their sum, 1 - decay^n (as Adam does), so the first update is the average and what
    it was before, the random initial weights or nothing, has no part in it.

    Of parameters on a mesh each process averages the shards that its devices hold, each once.

    `update` copies the parameters on the device (the step will overwrite them) and returns; one thread waits for the
    copy, brings it over and averages. Updates are applied in order, so the result does not depend on timing. At most
    `max_pending` copies wait; beyond that `update` blocks rather than skip one.
    """

    def __init__(self, average: Params, *, decay: float, num_updates: int = 0, max_pending: int = 2) -> None:
        """`average` is what `num_updates` updates have made; without any, what `average()` gives until the first."""
        self._average = jax.tree.map(_shards, average)
        self._like = jax.tree.map(_abstract, average)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._like)
        self._copy: Any = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings)
        self._decay = decay
        self._num_updates = num_updates
        self._max_pending = max_pending
        self._pending: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")

    def update(self, params: Params) -> None:
        """Schedules one averaging with the parameters as they are now; raises `UserError` if an earlier one failed."""
        if len(self._pending) >= self._max_pending:
            self._wait_for_oldest()
        self._num_updates += 1
        weight = (1.0 - self._decay) / (1.0 - self._decay**self._num_updates)
        self._pending.append(self._thread.submit(self._average_with, self._copy(params), weight))

    def average(self) -> Any:
        """The average after every update so far, as copies in float32, on the mesh if the parameters are.

        Waits for what is pending.
        """
        while self._pending:
            self._wait_for_oldest()
        return jax.tree.map(_joined, self._like, self._average)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True)

    def _wait_for_oldest(self) -> None:
        try:
            self._pending.pop(0).result()
        except Exception as error:  # whatever ended the thread's work, the average is wrong from here on
            raise UserError(
                f"averaging the parameters failed ({type(error).__name__}: {error}); free memory, or train without an "
                "average (train.ema_decay=0) in another --run-dir."
            ) from error

    def _average_with(self, params: Any, weight: float) -> None:
        jax.tree.map(partial(_blend, weight=weight), self._average, jax.tree.map(_shards, params))


def _shards(leaf: Any) -> dict[str, np.ndarray]:
    """What this process holds of an array, by place, each part once, in float32."""
    # np.array copies: a view of a device buffer would change when the step overwrites it.
    if not isinstance(leaf, jax.Array):
        return {"": np.array(leaf, np.float32)}
    parts = {_place(shard.index): shard for shard in leaf.addressable_shards}
    return {place if _is_on_mesh(leaf) else "": np.array(part.data, np.float32) for place, part in parts.items()}


def _joined(like: jax.ShapeDtypeStruct, shards: dict[str, np.ndarray]) -> Any:
    """The array whose parts are `shards`."""
    if like.sharding is None:
        return np.copy(shards[""])
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.copy(shards[_place(index)]))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding if _is_on_mesh(leaf) else None
    return jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=sharding)


def _is_on_mesh(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _place(index: Any) -> str:
    """A shard's index as a key."""
    return ", ".join(f"{part.start}:{part.stop}" for part in index)


def _blend(average: np.ndarray, fresh: np.ndarray, *, weight: float) -> None:
    """average ← average + weight · (fresh - average), in place; exactly `fresh` with weight 1."""
    if weight == 1.0:
        average[...] = fresh
    else:
        average += np.float32(weight) * (fresh - average)
