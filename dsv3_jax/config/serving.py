"""What a serving engine may use, and what a server accepts; every limit with its default."""

import dataclasses

from dsv3_jax.config.check import check, check_finite

PAGE_SIZE = 64
"""Tokens a page of the latent cache."""


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """An engine's room and a server's limits."""

    max_num_seqs: int = 16
    """Sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step, those of decoding sequences and of chunks of prompts together; None: 128 on a CPU, 2048
    elsewhere."""
    num_pages: int | None = None
    """Pages of the latent cache, 64 tokens each; None: room for `max_num_seqs` sequences of 2048 tokens, or of
    `max_position` where that is less."""
    max_output_tokens: int | None = None
    """Tokens of one completion, at most; all of the room but that many is then for its prompt, so that every prompt
    that is taken may have every completion that is. None: only their sum is limited."""
    prefix_cache: bool = True
    """Pages of finished sequences are found again by prompts that begin with the same tokens."""
    batch_invariant: bool = False
    """Pads every decoding step to `max_num_seqs` and every chunk to one size: logits are the same bits whoever runs
    beside."""

    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    max_n: int = 16
    """Completions of one prompt."""
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    """Of one stop string."""
    max_stop_ids: int = 64
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 65_536
    stall_seconds: float = 60.0
    """Time without a step while work waits, after which the server calls itself not ready."""
    drain_seconds: float = 30.0
    """Time that running requests get to end after SIGTERM."""

    def __post_init__(self) -> None:
        check_finite(self)
        where = "(ServingConfig)"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool or value is None:
                continue
            least = 0 if field.name in ("drain_seconds", "max_logprobs", "max_logit_bias") else 1
            check(value >= least, f"{field.name}={value} must be at least {least} {where}.")
        if self.max_num_batched_tokens is not None:
            check(
                self.max_num_batched_tokens >= self.max_num_seqs,
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                f"every running sequence needs one token a step; raise it {where}.",
            )
