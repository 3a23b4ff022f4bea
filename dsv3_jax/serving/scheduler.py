"""What each step of an engine computes, and for whom: continuous batching over a pool of pages."""

import bisect
import dataclasses
import operator
from collections import deque

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.accept import accept, without_known
from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.page_tables import PageTables, pages_for
from dsv3_jax.serving.sequence import Drawn, Progress, Sequence, Status, StepPlan, StepResult, Work

_rank = operator.attrgetter("rank")


@dataclasses.dataclass(slots=True)
class _Notes:
    """What the scheduler remembers of a sequence besides its own fields."""

    sequence: Sequence
    has_run: bool = False
    num_prompt_logprobs: int = 0
    """Handed out so far."""


class Scheduler:
    """Decides step by step: `schedule`, run the plan, `update`. One plan and one call at a time.

    Sequences rank by priority, then by arrival. A step gives every decoding sequence a token, and what is left of
    `max_num_batched_tokens` to chunks of prompts in the order of rank. The first waiting sequence starts when a slot
    and pages for all its tokens are there, and some to spare; nobody passes it. Where a running one needs a page and
    none is left, the last in rank is preempted: it waits, and is computed again behind what the cache still has of it.
    So are running ones of a lower priority than the first waiting one, where that makes room for it.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        fingerprint: bytes,
        prefix_cache: bool = True,
        share_completions: bool = True,
    ):
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} is less than max_num_seqs={max_num_seqs}: every "
                "running sequence needs one token a step; raise it."
            )
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._smallest_rest = min(PAGE_SIZE, max_num_batched_tokens // 2)
        """Of a step's tokens, that begins a prompt it cannot finish: a chunk costs a program, however small it is."""
        self._prefix_cache = prefix_cache
        self._tables = PageTables(
            num_pages, fingerprint=fingerprint, is_shared=prefix_cache, with_completions=share_completions
        )
        self._notes: dict[int, _Notes] = {}
        """By the ids of sequences that have not ended."""
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        """Both in the order of rank."""
        self._num_added = 0
        self.num_waiting_tokens = 0
        self.prefix_queries = 0
        """Prompt tokens that were looked up in the cache."""
        self.prefix_hits = 0
        """Prompt tokens that were found there."""
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot or for pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._notes)

    @property
    def usage(self) -> float:
        """Share of the pages that running sequences refer to."""
        return self._tables.usage

    @property
    def _num_spare(self) -> int:
        """Pages left for those who run when another starts, so that they seldom preempt it in its first steps."""
        return len(self._running) // 2

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence into the queue. Raises `RequestError` for one that could never end."""
        room, length = self._tables.num_tokens, len(sequence.prompt)
        if not length:
            raise RequestError("the prompt is empty; give at least one token.", param="prompt")
        if length + sequence.max_tokens > room:
            raise RequestError(
                f"a prompt of {length} tokens and max_tokens={sequence.max_tokens} exceed the {room} tokens that the "
                "cache has room for; shorten the prompt or lower max_tokens.",
                param="prompt" if length > room else "max_tokens",
            )
        if sequence.id in self._notes:
            raise ValueError(f"a sequence with id={sequence.id} is already here; give each its own.")
        sequence.order = self._num_added
        self._num_added += 1
        self._notes[sequence.id] = _Notes(sequence)
        self._wait(sequence)

    def abort(self, sequence_id: int) -> Progress | None:
        """Ends a sequence in whatever state; None where it has already ended."""
        return self.finish(sequence_id, "abort")

    def finish(self, sequence_id: int, reason: str) -> Progress | None:
        """Ends a sequence for a reason that tokens do not show, as a stop string; None where it has already ended."""
        notes = self._notes.get(sequence_id)
        if notes is None:
            return None
        self._end(notes.sequence, reason)
        return Progress(notes.sequence, Drawn(()), reason)

    def schedule(self) -> StepPlan:
        """The next step; empty where nobody waits or runs."""
        self._make_room()
        self._make_way()
        decodes, prompts = [], deque()
        for sequence in self._running:
            if sequence.num_computed >= len(sequence.prompt) and sequence.num_computed + 1 == len(sequence.tokens):
                decodes.append(Work(sequence, sequence.num_computed, 1))
            else:
                prompts.append(sequence)
        chunks, may_start, budget = [], True, self._max_num_batched_tokens - len(decodes)
        while budget > 0:
            sequence = None
            if may_start and self._waiting and (not prompts or self._waiting[0].rank < prompts[0].rank):
                sequence = self._start_first()
                may_start = sequence is not None
            if sequence is None:
                if not prompts:
                    break
                sequence = prompts.popleft()
            num_left = len(sequence.tokens) - sequence.num_computed
            if chunks and num_left > budget < self._smallest_rest:
                break
            count = min(budget, num_left)
            chunks.append(Work(sequence, sequence.num_computed, count))
            budget -= count
        return StepPlan(tuple(decodes), tuple(chunks))

    def update(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Puts drawn tokens behind their sequences, up to one that ends it, and lets full pages be found.

        Sequences that ended, or lost their pages, since `schedule` are left out, and so are those without news.
        """
        progress = []
        for work, drawn in zip(plan.works, result.drawn, strict=True):
            sequence = work.sequence
            if sequence.status is not Status.RUNNING or sequence.num_computed != work.start:
                continue
            if work.draws and not drawn.tokens:
                raise RuntimeError(f"the step drew no token for sequence {sequence.id}, which computed its last one.")
            self._tables.count(work)
            notes = self._notes[sequence.id]
            news = accept(sequence, without_known(drawn, start=work.start, num_known=notes.num_prompt_logprobs))
            notes.num_prompt_logprobs += len(news.drawn.prompt_logprobs or ())
            if news.finish_reason is not None:
                self._end(sequence, news.finish_reason)
            if news.finish_reason is not None or news.drawn.tokens or news.drawn.prompt_logprobs:
                progress.append(news)
        return progress

    def forget_pages(self, fingerprint: bytes) -> None:
        """Weights changed: no page of the old ones is found again, and running sequences are computed again."""
        self._tables.forget(fingerprint)
        while self._running:
            self._pause_last()

    def check(self) -> None:
        """Raises unless free + cached + referenced pages == total, and every sequence is in the one place it should."""
        self._tables.check(self._running, live=self._notes)
        for sequences, status in ((self._waiting, Status.WAITING), (self._running, Status.RUNNING)):
            if sequences != sorted(sequences, key=_rank) or any(one.status is not status for one in sequences):
                raise RuntimeError(f"{status.value} sequences are out of order: {[one.id for one in sequences]}.")
        if {one.id for one in self._waiting + self._running} != set(self._notes):
            raise RuntimeError(f"of sequences {sorted(self._notes)} some neither wait nor run.")
        if any(one.pages or one.num_computed for one in self._waiting):
            raise RuntimeError("a waiting sequence holds pages.")
        if self.num_waiting_tokens != sum(len(one.tokens) for one in self._waiting):
            raise RuntimeError(f"num_waiting_tokens={self.num_waiting_tokens} is not what the waiting sequences have.")

    def _make_room(self) -> None:
        """Gives running sequences the pages that new tokens need; preempts the last ones where there are too few."""
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if len(sequence.tokens) <= len(sequence.pages) * PAGE_SIZE:
                index += 1
            elif self._tables.num_available:
                self._tables.extend(sequence)
            else:
                self._preempt_last()

    def _make_way(self) -> None:
        """Preempts running sequences of a lower priority than the first waiting one, where that lets it start."""
        if not self._waiting or not self._running or self._running[-1].priority <= self._waiting[0].priority:
            return
        priority, num_pages = self._waiting[0].priority, pages_for(len(self._waiting[0].tokens))
        lower = [one for one in self._running if one.priority > priority]
        staying = {page for one in self._running if one.priority <= priority for page in one.pages}
        freed = {page for one in lower for page in one.pages} - staying
        if self._tables.num_available + len(freed) < num_pages + (len(self._running) - len(lower)) // 2:
            return
        for _ in lower:
            has_slot = len(self._running) < self._max_num_seqs
            if has_slot and self._tables.num_available >= num_pages + self._num_spare:
                return
            self._preempt_last()

    def _preempt_last(self) -> None:
        self._running[-1].num_preemptions += 1
        self.preemptions += 1
        self._pause_last()

    def _pause_last(self) -> None:
        """Lets the last running sequence wait, without its pages."""
        sequence = self._running.pop()
        self._tables.close(sequence)
        self._wait(sequence)

    def _start_first(self) -> Sequence | None:
        """Lets the first waiting sequence run behind what the cache has of it, where there is room."""
        sequence = self._waiting[0]
        notes, params = self._notes[sequence.id], sequence.params
        is_whole = params.prompt_logprobs is not None and notes.num_prompt_logprobs < len(sequence.prompt) - 1
        if len(self._running) >= self._max_num_seqs:
            return None
        if not self._tables.open(sequence, num_spare=self._num_spare, may_find=not is_whole):
            return None
        self._run(notes, is_looked_up=self._prefix_cache and not is_whole)
        return sequence

    def _run(self, notes: _Notes, *, is_looked_up: bool) -> None:
        """Moves the first waiting sequence to the running ones; counts its first look into the cache."""
        sequence = self._waiting.pop(0)
        self.num_waiting_tokens -= len(sequence.tokens)
        sequence.status = Status.RUNNING
        bisect.insort(self._running, sequence, key=_rank)
        if not notes.has_run and is_looked_up:
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix_queries += len(sequence.prompt)
            self.prefix_hits += sequence.num_computed
        notes.has_run = True

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.num_waiting_tokens += len(sequence.tokens)
        bisect.insort(self._waiting, sequence, key=_rank)

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._tables.close(sequence)
        else:
            self._waiting.remove(sequence)
            self.num_waiting_tokens -= len(sequence.tokens)
        self._tables.end(sequence)
        del self._notes[sequence.id]
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
