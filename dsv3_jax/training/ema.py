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

    `update` copies the parameters on the device (the step will overwrite them) and returns; one thread waits for the
    copy, brings it over and averages. Updates are applied in order, so the result does not depend on timing. At most
    `max_pending` copies wait; beyond that `update` blocks rather than skip one.
    """

    def __init__(self, average: Params, *, decay: float, num_updates: int = 0, max_pending: int = 2) -> None:
        """`average` is what `num_updates` updates have made; without any, what `average()` gives until the first."""
        # np.array copies: a view of a device buffer would change when the step overwrites it.
        self._average = jax.tree.map(partial(np.array, dtype=np.float32), average)
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
        self._pending.append(self._thread.submit(self._average_with, _copy(params), weight))

    def average(self) -> Any:
        """The average after every update so far, as copies in float32. Waits for what is pending."""
        while self._pending:
            self._wait_for_oldest()
        return jax.tree.map(np.copy, self._average)

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
        fresh = jax.tree.map(partial(np.asarray, dtype=np.float32), jax.device_get(params))
        jax.tree.map(partial(_blend, weight=weight), self._average, fresh)


@jax.jit
def _copy(params: Params) -> Params:
    return jax.tree.map(jnp.copy, params)


def _blend(average: np.ndarray, fresh: np.ndarray, *, weight: float) -> None:
    """average ← average + weight · (fresh - average), in place; exactly `fresh` with weight 1."""
    if weight == 1.0:
        average[...] = fresh
    else:
        average += np.float32(weight) * (fresh - average)
