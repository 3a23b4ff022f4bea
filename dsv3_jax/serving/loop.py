"""The engine's steps, one after another on a thread of their own."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.emitter import Emitter, Sink
from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.mailbox import Mailbox
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.runner import Runner
from dsv3_jax.serving.scheduler import Scheduler
from dsv3_jax.serving.sequence import Drawn, Progress, Sequence

log = logging.getLogger("dsv3_jax.serving")


class Loop:
    """Schedules, runs and hands out, until it is closed. Other threads reach it through the mailbox alone."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        mailbox: Mailbox,
        *,
        tokenizer: TextTokenizer | None,
        eos_ids: frozenset[int],
        metrics: Metrics,
        warm_up: Callable[[int, int], None] | None,
    ):
        self.scheduler = scheduler
        """To be read from any thread, and changed on the step thread alone."""
        self._runner, self._mailbox, self._metrics = runner, mailbox, metrics
        self._emitter = Emitter(tokenizer=tokenizer, eos_ids=eos_ids, metrics=metrics, end=self._end)
        self._num_arriving = self._num_arriving_tokens = 0  # sequences in the mailbox
        self._state = "ready" if warm_up is None else "starting"
        self._unsent: list[Progress] = []
        self._last_step = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(warm_up,), daemon=True, name="engine steps")
        self._thread.start()

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining", "failed" or "closed"."""
        return self._state

    @property
    def num_readers(self) -> int:
        """Completions that have not ended."""
        return self._emitter.num_readers

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet, or were preempted."""
        return self.scheduler.num_waiting + self._num_arriving

    @property
    def num_waiting_tokens(self) -> int:
        """Of their prompts."""
        return self.scheduler.num_waiting_tokens + self._num_arriving_tokens

    @property
    def seconds_without_step(self) -> float:
        """Since the last one, while work waits."""
        is_idle = self._state not in ("ready", "draining") or not self.scheduler.has_work
        return 0.0 if is_idle else time.monotonic() - self._last_step

    def describe(self) -> dict[str, Any]:
        """Its state in numbers, for a log."""
        return {
            "state": self._state,
            "running": self.scheduler.num_running,
            "waiting": self.num_waiting,
            "pages_used": round(self.scheduler.usage, 4),
            "preemptions": self.scheduler.preemptions,
            "seconds_without_step": round(self.seconds_without_step, 3),
        }

    def add(self, sequence: Sequence, *, sink: Sink, index: int, request_id: str) -> None:
        """Has a sequence scheduled from the next step on. The caller holds the mailbox's lock."""
        self._emitter.open(sequence, sink=sink, index=index, request_id=request_id)
        self._num_arriving += 1
        self._num_arriving_tokens += len(sequence.prompt)

        def arrive() -> None:
            with self._mailbox.changed:
                self._num_arriving -= 1
                self._num_arriving_tokens -= len(sequence.prompt)
            if not self.scheduler.has_work:
                self._last_step = time.monotonic()  # what a stall is counted from
            try:
                self.scheduler.add(sequence)
            except RequestError:
                log.exception("request %s: the scheduler refuses what was admitted; it is ended", request_id)
                self._emitter.put([Progress(sequence, Drawn(()), "abort")])

        self._mailbox.post_locked(arrive)

    def abort(self, sequence_id: int) -> None:
        """Ends a sequence before the next step."""

        def end() -> None:
            progress = self.scheduler.abort(sequence_id)
            if progress is not None:
                self._runner.forget(progress.sequence)
                self._send()  # its tokens, before its end
                self._emitter.put([progress])

        self._mailbox.post(end)

    def drain(self) -> None:
        """Takes no more sequences."""
        with self._mailbox.changed:
            if self._state in ("ready", "starting"):
                self._state = "draining"

    def close(self) -> None:
        """Ends every sequence with "abort", and both threads."""
        with self._mailbox.changed:
            if self._state != "failed":
                self._state = "closed"
            self._mailbox.changed.notify_all()
        self._thread.join()
        self._emitter.close()

    def _run(self, warm_up: Callable[[int, int], None] | None) -> None:
        try:
            if warm_up is not None:
                self._runner.warm_up(warm_up)
            with self._mailbox.changed:
                if self._state == "starting":
                    self._state = "ready"
            while self._state != "closed":
                self._mailbox.wait(lambda: self.scheduler.has_work or self._state == "closed")
                self._mailbox.run_all()
                if self.scheduler.has_work:
                    self._step()
                if not self.scheduler.has_work:
                    self._send()
                self._measure()  # orders change what runs, too: an abort may leave nothing for a step
        except Exception:
            log.exception("the engine failed; its requests end, and it takes no more")
            with self._mailbox.changed:
                self._state = "failed"
        finally:
            self._mailbox.close()
            self._send()
            self._emitter.end_all("abort")

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        self._emitter.started([work.sequence for work in plan.chunks])
        launched = self._runner.launch(plan)
        self._send()
        self._unsent = self.scheduler.update(plan, self._runner.wait(launched))
        for one in self._unsent:
            if one.finish_reason is not None:
                self._runner.forget(one.sequence)
        self._last_step = time.monotonic()

    def _send(self) -> None:
        """Hands out what the last step gave.

        While the next one runs: before it, the threads that make text and answers of it would hold the interpreter,
        and the device would wait.
        """
        if self._unsent:
            self._emitter.put(self._unsent)
            self._unsent = []

    def _measure(self) -> None:
        self._metrics.step(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            usage=self.scheduler.usage,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            preemptions=self.scheduler.preemptions,
        )

    def _end(self, sequence_id: int, reason: str) -> None:
        """Where the text decides that a sequence has ended; called on the output thread."""

        def end() -> None:
            progress = self.scheduler.finish(sequence_id, reason)
            if progress is not None:
                self._runner.forget(progress.sequence)

        self._mailbox.post(end)
