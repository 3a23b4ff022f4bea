"""One completion on its way through the engine."""

import dataclasses
import enum
from typing import NamedTuple

from dsv3_jax.serving.params import SamplingParams


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """For its first step, or for one after it was preempted."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what was generated behind it. The scheduler owns all but the first block."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    """Of its draws, below 2^32."""
    max_tokens: int
    """Tokens to generate, at most."""
    stop_ids: frozenset[int]
    """That end it: eos, unless it is ignored, and `params.stop_token_ids`."""
    priority: int = 0
    """The lower, the earlier."""
    cache_salt: str = ""
    """Sequences share pages only with those of the same salt."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    """Prompt and completion so far."""
    status: Status = Status.WAITING
    finish_reason: str | None = None
    """"stop", "length" or "abort"."""
    order: int = 0
    """Of arrival."""
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    """Tokens whose latents lie in its pages."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the cache when it first ran."""
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens behind the prompt."""
        return len(self.tokens) - len(self.prompt)

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the earlier."""
        return self.priority, self.order


class Work(NamedTuple):
    """What a step does for one sequence: computes `count` tokens behind `start` of them."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """It reaches the sequence's last token, and one more is wanted behind it."""
        sequence = self.sequence
        return self.start + self.count == len(sequence.tokens) and sequence.num_generated < sequence.max_tokens


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step of the engine."""

    decodes: tuple[Work, ...]
    """One token each."""
    chunks: tuple[Work, ...]
    """Parts of prompts, or of sequences that are computed again."""

    @property
    def works(self) -> tuple[Work, ...]:
        """All of them, in the order of `StepResult.drawn`."""
        return self.decodes + self.chunks

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class TokenLogprobs(NamedTuple):
    """Log-probabilities in one place of a sequence, by softmax(logits)."""

    logprob: float
    """Of the token that stands there."""
    rank: int
    """How many tokens are at least as likely as it; 1 for the likeliest."""
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the likeliest tokens, the likeliest first."""


class Drawn(NamedTuple):
    """What a step gave to one sequence."""

    tokens: tuple[int, ...]
    """Empty where nothing was drawn."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of `tokens`, where the request asked."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of the prompt's tokens start + 1 … start + count that the chunk predicts, where the request asked; those that
    were given before are left out."""


class StepResult(NamedTuple):
    """One `Drawn` for each of a plan's works."""

    drawn: tuple[Drawn, ...]


class Progress(NamedTuple):
    """What a step or an abort changed for a sequence."""

    sequence: Sequence
    drawn: Drawn
    """Tokens that were accepted: none behind one that ends the sequence."""
    finish_reason: str | None
    """Where it ended."""
