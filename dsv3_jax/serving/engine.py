"""The serving engine: requests in, tokens out, one step at a time on a thread of its own."""

import itertools
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig
from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.model.functions import Functions
from dsv3_jax.serving.admission import Queue, check_queue, checked_ids, tokens_to_come
from dsv3_jax.serving.emitter import Sink
from dsv3_jax.serving.errors import Overloaded, Unavailable
from dsv3_jax.serving.loop import Loop
from dsv3_jax.serving.mailbox import Mailbox
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.outputs import Delta, RequestOutput, in_order
from dsv3_jax.serving.params import SamplingParams, check_limits, every
from dsv3_jax.serving.runner import Runner
from dsv3_jax.serving.scheduler import Scheduler
from dsv3_jax.serving.sequence import Sequence as Completion
from dsv3_jax.typing import Variables


class Engine:
    """Completes many prompts at once over a paged latent cache; prompts come and go between steps.

        with ds.Engine(cfg, variables) as engine:
            outputs = engine.generate([[0, 17, 23], [0, 5]], ds.SamplingParams(max_tokens=16))

    Every method may be called from any thread.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}`.
        serving: room and limits.
        tokenizer: for text; without one, prompts and answers are ids.
        eos_ids: that end a completion; default: `cfg.eos_id`.
        functions: what a layer is made of; default: `functions_of` the dtype that the parameters have.
        warm_up: compile every step before the first request; called with (steps that are ready, steps in all). Until
            then `state` is "starting". None: compile a step when it is first needed.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        variables: Variables,
        serving: ServingConfig | None = None,
        tokenizer: TextTokenizer | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
        functions: Functions | None = None,
        warm_up: Callable[[int, int], None] | None = None,
    ):
        self.cfg, self.serving, self.tokenizer = cfg, serving or ServingConfig(), tokenizer
        default = () if cfg.eos_id is None else (cfg.eos_id,)
        self.eos_ids = frozenset(default if eos_ids is None else eos_ids)
        self.metrics = Metrics()
        self._ids, self._versions = itertools.count(), itertools.count(1)
        runner = Runner(cfg, variables, self.serving, functions=functions)
        self._runner, self._mailbox = runner, Mailbox()
        check(
            self.max_prompt_tokens >= 1,
            f"max_output_tokens={self.serving.max_output_tokens} of {self.max_length} tokens in all leaves none for a "
            "prompt; lower it, or raise num_pages (ServingConfig).",
        )
        self._loop = Loop(
            runner,
            Scheduler(
                num_pages=runner.num_pages,
                max_num_seqs=self.serving.max_num_seqs,
                max_num_batched_tokens=runner.max_num_batched_tokens,
                fingerprint=runner.fingerprint,
                prefix_cache=self.serving.prefix_cache,
                share_completions=not self.serving.batch_invariant,
            ),
            self._mailbox,
            tokenizer=tokenizer,
            eos_ids=self.eos_ids,
            metrics=self.metrics,
            warm_up=warm_up,
        )

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining", "failed" or "closed"."""
        return self._loop.state

    @property
    def is_stalled(self) -> bool:
        """Work waits, and no step has ended for `serving.stall_seconds`."""
        return self._loop.seconds_without_step > self.serving.stall_seconds

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together, at most."""
        return min(self.cfg.max_position, self._runner.num_pages * PAGE_SIZE)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt, at most."""
        return self.max_length - (self.serving.max_output_tokens or 0)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        sink: Sink,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        first_index: int = 0,
    ) -> list[int]:
        """Begins `params.n` completions of a prompt, and returns at once with their ids.

        Args:
            prompt_ids: at least one.
            sink: gets the pieces; called on the output thread, so it should return soon.
            request_id: for the log.
            priority: the lower, the earlier; among equals the one that came first.
            cache_salt: pages are shared only among requests of the same salt.
            first_index: the number that the first completion's pieces have.

        Raises:
            RequestError: a prompt or parameters that cannot be answered.
            Overloaded: too many requests wait.
            Unavailable: the engine is not ready.
        """
        prompt, max_tokens = self._checked(prompt_ids, params)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        sequences = [
            Completion(
                id=next(self._ids),
                prompt=prompt,
                params=params,
                seed=(seed + number) % 2**32,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                priority=priority,
                cache_salt=cache_salt,
            )
            for number in range(params.n)
        ]
        with self._mailbox.changed:
            self._check_room(len(sequences), len(prompt))
            for number, sequence in enumerate(sequences):
                self._loop.add(sequence, sink=sink, index=first_index + number, request_id=request_id)
        self.metrics.submitted(len(prompt))
        return [sequence.id for sequence in sequences]

    def abort(self, ids: Sequence[int]) -> None:
        """Ends completions before the next step, with `finish_reason` "abort"; those that have ended are left out."""
        for one in ids:
            self._loop.abort(one)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[Delta]:
        """Pieces of the completions as they come; `index` is prompt · n + completion.

        `params` is one for all prompts, or one for each. However many prompts there are, they wait for room.

        Raises:
            RequestError: as `submit`, before anything is computed.
            Unavailable: the engine is not ready, or it failed.
        """
        each = every(params, len(prompts))
        for prompt, one in zip(prompts, each, strict=True):
            self._checked(prompt, one)
        return self._pieces(prompts, each, priority=priority, cache_salt=cache_salt)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """The completions of all prompts, in order; those of a prompt with n > 1 stand together. Raises as `stream`."""
        each = every(params, len(prompts))
        deltas = self.stream(prompts, each, priority=priority, cache_salt=cache_salt)
        return in_order(prompts, [one.n for one in each], deltas)

    def update_weights(self, variables: Variables) -> int:
        """Puts other weights in the place of these between two steps; returns the number of the version, 1 first.

        No page of the old weights is read again: completions on their way are computed again, so that every later
        token comes from the new weights alone.

        Raises:
            ConfigError: another tree, shape or dtype than the engine began with; then nothing has changed.
        """

        def replace() -> int:
            self._runner.update_weights(variables)
            self._loop.scheduler.forget_pages(self._runner.fingerprint)
            return next(self._versions)

        return self._mailbox.call(replace)

    def check(self) -> None:
        """Raises unless free, cached and referenced pages are all there are, between two steps."""
        self._mailbox.call(self._loop.scheduler.check)

    def describe(self) -> dict[str, Any]:
        """Its state in numbers, for a log."""
        return self._loop.describe()

    def drain(self, seconds: float) -> bool:
        """Takes no more requests, and waits until those on their way have ended; False where time ran out."""
        self._loop.drain()
        end = time.monotonic() + seconds
        while self._loop.num_readers and self.state == "draining":
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Ends what is on its way with "abort", and the threads."""
        self._loop.close()

    def _pieces(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, priority: int, cache_salt: str
    ) -> Iterator[Delta]:
        """Submits prompts as long as there is room, and gives out what comes; aborts the rest when it is closed."""
        arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        settings: Any = {"sink": arrived.put, "priority": priority, "cache_salt": cache_salt}
        waiting = list(zip(prompts, params, strict=True))[::-1]
        running: dict[int, int] = {}
        first = 0
        try:
            while waiting or running:
                while waiting:
                    try:
                        ids = self.submit(*waiting[-1], first_index=first, **settings)
                    except Overloaded:
                        break
                    running |= {first + number: sequence for number, sequence in enumerate(ids)}
                    first += len(ids)
                    waiting.pop()
                if not running:  # others wait in front
                    time.sleep(0.01)
                    continue
                delta = arrived.get()
                if delta.finish_reason is not None:
                    del running[delta.index]
                if delta.finish_reason == "abort" and self.state in ("failed", "closed"):
                    raise Unavailable(f"the engine {self.state} before the completion ended; its log has the reason.")
                yield delta
        finally:
            self.abort(list(running.values()))

    def _checked(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], int]:
        """The prompt, and how many tokens may follow it."""
        has_tokenizer = self.tokenizer is not None
        check_limits(params, vocab_size=self.cfg.vocab_size, has_tokenizer=has_tokenizer, serving=self.serving)
        prompt = checked_ids(prompt_ids, vocab_size=self.cfg.vocab_size)
        limits = {"max_length": self.max_length, "max_output_tokens": self.serving.max_output_tokens}
        return prompt, tokens_to_come(len(prompt), params.max_tokens, **limits)

    def _check_room(self, num_sequences: int, num_tokens: int) -> None:
        """Whether the engine takes as many more sequences of so many tokens each; with the mailbox's lock."""
        if self.state != "ready":
            raise Unavailable(f"the engine is {self.state}; it takes no requests.")
        waiting = Queue(self._loop.num_waiting, self._loop.num_waiting_tokens)
        check_queue(waiting, Queue(num_sequences, num_sequences * num_tokens), serving=self.serving)
