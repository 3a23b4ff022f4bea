"""From a sequence's tokens to what its caller reads, on a thread of its own: the steps do not wait for text."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.outputs import Delta
from dsv3_jax.serving.sequence import Drawn, Progress, TokenLogprobs
from dsv3_jax.serving.sequence import Sequence as Completion
from dsv3_jax.serving.text import TextStream

log = logging.getLogger("dsv3_jax.serving")

Sink = Callable[[Delta], None]
"""Gets the pieces of a completion in order, the last one with a `finish_reason`; called on the output thread."""


@dataclasses.dataclass(eq=False)
class Reader:
    """Who reads one completion, and how far it has read."""

    sequence: Completion
    sink: Sink
    index: int
    request_id: str
    text: TextStream | None
    arrived: float
    started: float | None = None
    """When a step first worked for it."""
    last: float | None = None
    """When tokens last came."""
    num_tokens: int = 0
    is_opened: bool = False
    """Its first piece went out."""
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """Of the prompt's tokens behind the first."""

    def take(self, drawn: Drawn, finish_reason: str | None, eos_ids: frozenset[int]) -> Delta:
        """The piece that new tokens make; a stop string may end it before the engine knows."""
        tokens, logprobs, stop, text = drawn.tokens, drawn.logprobs, None, ""
        if finish_reason == "stop" and tokens[-1] not in eos_ids:
            stop = tokens[-1]
        if self.text is not None:
            is_hidden = finish_reason == "stop" and not self.sequence.params.include_stop_str_in_output
            piece = self.text.add(tokens[:-1] if is_hidden else tokens)
            text = piece.text
            if piece.stop is not None:
                tokens, stop, finish_reason = tokens[: piece.num_tokens], piece.stop, "stop"
                logprobs = None if logprobs is None else logprobs[: piece.num_tokens]
            elif finish_reason is not None:
                text += self.text.end()
        if drawn.prompt_logprobs is not None:
            self.prompt_logprobs.extend(drawn.prompt_logprobs)
        is_asked = self.sequence.params.prompt_logprobs is not None
        opens = not self.is_opened and bool(tokens or finish_reason)
        self.is_opened |= opens
        self.num_tokens += len(tokens)
        return Delta(
            index=self.index,
            text=text,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=(None, *self.prompt_logprobs) if opens and is_asked else None,
            finish_reason=finish_reason,
            stop_reason=stop,
            num_prompt_tokens=len(self.sequence.prompt),
            num_cached_tokens=self.sequence.num_cached_tokens,
        )


class Emitter:
    """Takes what each step gave, and hands every reader its piece."""

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer | None,
        eos_ids: frozenset[int],
        metrics: Metrics,
        end: Callable[[int, str], None],
    ):
        """`end(sequence id, reason)` tells the engine that a sequence needs no more steps."""
        self._tokenizer, self._eos_ids, self._metrics, self._end = tokenizer, eos_ids, metrics, end
        self._readers: dict[int, Reader] = {}
        self._queue: queue.SimpleQueue[list[Progress] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine output", daemon=True)
        self._thread.start()

    @property
    def num_readers(self) -> int:
        """Completions that have not ended."""
        return len(self._readers)

    def open(self, sequence: Completion, *, sink: Sink, index: int, request_id: str) -> None:
        """Adds a reader before its sequence's first step."""
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer, sequence.params, sequence.prompt)
        self._readers[sequence.id] = Reader(sequence, sink, index, request_id, text, arrived=time.monotonic())

    def started(self, sequences: Sequence[Completion]) -> None:
        """Notes the time at which a step first works for a sequence."""
        for sequence in sequences:
            reader = self._readers.get(sequence.id)
            if reader is not None and reader.started is None:
                reader.started = time.monotonic()

    def put(self, progress: list[Progress]) -> None:
        """What one step changed."""
        self._queue.put(progress)

    def end_all(self, reason: str) -> None:
        """Ends every reader: no step will come."""
        self.put([Progress(reader.sequence, Drawn(()), reason) for reader in list(self._readers.values())])

    def close(self) -> None:
        """Hands out what is left, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            for progress in batch:
                reader = self._readers.get(progress.sequence.id)
                if reader is not None:
                    self._emit(reader, progress)

    def _emit(self, reader: Reader, progress: Progress) -> None:
        """A reader that fails ends alone."""
        sequence, is_ended = progress.sequence, progress.finish_reason is not None
        try:
            delta = reader.take(progress.drawn, progress.finish_reason, self._eos_ids)
            if delta.finish_reason is not None:
                del self._readers[sequence.id]
            self._measure(reader, delta)
            if not _is_empty(delta):
                reader.sink(delta)
        except Exception:
            log.exception("request %s: its output failed; it is ended", reader.request_id)
            self._readers.pop(sequence.id, None)
            self._metrics.failed()
            if not is_ended:
                self._end(sequence.id, "abort")
            _abort(reader)
            return
        if delta.finish_reason is not None and not is_ended:
            self._end(sequence.id, delta.finish_reason)

    def _measure(self, reader: Reader, delta: Delta) -> None:
        now = time.monotonic()
        if delta.token_ids:
            if reader.last is None:
                started = now if reader.started is None else reader.started
                self._metrics.first_token(now - reader.arrived, started - reader.arrived)
            self._metrics.tokens(len(delta.token_ids), None if reader.last is None else now - reader.last)
            reader.last = now
        if delta.finish_reason is not None:
            self._metrics.finished(
                delta.finish_reason,
                seconds=now - reader.arrived,
                num_prompt_tokens=len(reader.sequence.prompt),
                num_tokens=reader.num_tokens,
            )


def _is_empty(delta: Delta) -> bool:
    return not (delta.token_ids or delta.text or delta.prompt_logprobs or delta.finish_reason)


def _abort(reader: Reader) -> None:
    """Tells a reader that its completion ended, so that nobody waits for it."""
    sequence = reader.sequence
    ids = len(sequence.prompt), sequence.num_cached_tokens
    try:
        reader.sink(Delta(reader.index, "", (), None, None, "abort", None, *ids))
    except Exception:
        log.exception("request %s: nobody takes its end", reader.request_id)
