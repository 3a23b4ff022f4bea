"""What other threads want done between two steps of the engine."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dsv3_jax.serving.errors import Unavailable


class Mailbox:
    """Orders for the step thread, in the order of their arrival."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Its lock guards what `post_locked` adds; it is notified with every order."""
        self._orders: deque[Callable[[], None]] = deque()
        self._futures: set[Future[Any]] = set()
        self._is_closed = False

    def post(self, order: Callable[[], None]) -> None:
        """Has `order` called between two steps; drops it where there will be none."""
        with self.changed:
            self.post_locked(order)

    def post_locked(self, order: Callable[[], None]) -> None:
        """The same for a caller that holds the lock."""
        if not self._is_closed:
            self._orders.append(order)
            self.changed.notify_all()

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, called between two steps; raises what it raises.

        Raises:
            Unavailable: the engine has ended.
        """
        future: Future[Any] = Future()

        def order() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - whatever it is, `result` raises it in the caller's thread
                future.set_exception(error)

        with self.changed:
            if self._is_closed:
                raise Unavailable("the engine has ended; start another.")
            self.post_locked(order)
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future.result()

    def wait(self, is_due: Callable[[], bool]) -> None:
        """Returns when there is an order, or `is_due()`, which is asked with every notification."""
        with self.changed:
            self.changed.wait_for(lambda: bool(self._orders) or is_due())

    def run_all(self) -> None:
        """Calls every order; on the step thread."""
        while True:
            with self.changed:
                if not self._orders:
                    return
                order = self._orders.popleft()
            order()

    def close(self) -> None:
        """Refuses what waits and what will come."""
        with self.changed:
            self._is_closed = True
            self._orders.clear()
            waiting = list(self._futures)
        for future in waiting:
            future.set_exception(Unavailable("the engine has ended; start another."))
