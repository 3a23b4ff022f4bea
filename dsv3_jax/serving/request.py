"""The checks of what a caller of `generate` gives."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.serving.sampler import Sampling
from dsv3_jax.typing import Int


def checked_prompts(cfg: ModelConfig, prompt_ids: Any, max_new_tokens: int) -> list[np.ndarray]:
    """The prompts as int32 arrays."""
    prompts = [np.asarray(prompt) for prompt in prompt_ids]
    check(len(prompts) > 0, "prompt_ids is empty; give at least one prompt (generate).")
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1 (generate).")
    for row, prompt in enumerate(prompts):
        check(prompt.ndim == 1 and prompt.size > 0, f"prompt {row} is empty; give at least one token, such as bos.")
        check(
            np.issubdtype(prompt.dtype, np.integer),
            f"prompt {row} holds {prompt.dtype}, not integers; give token ids.",
        )
        foreign = prompt[(prompt < 0) | (prompt >= cfg.vocab_size)]
        check(
            foreign.size == 0,
            f"prompt {row} holds the id {foreign[:1].sum()}, outside 0..{cfg.vocab_size - 1}; "
            "is it from another tokenizer?",
        )
        check(
            prompt.size + max_new_tokens <= cfg.max_position,
            f"prompt {row} has {prompt.size} tokens, and with max_new_tokens={max_new_tokens} exceeds "
            f"max_position={cfg.max_position}; shorten either.",
        )
    return [prompt.astype(np.int32) for prompt in prompts]


def checked_stop_ids(cfg: ModelConfig, eos_id: int | Sequence[int] | None) -> Int[np.ndarray, "K"]:
    """The ids, filled up with -1, which is no token, to 1, 2, 4, ... of them: few shapes to compile."""
    ids = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Sequence) else [eos_id]
    for one in ids:
        check(
            0 <= one < cfg.vocab_size,
            f"eos_id={one} is outside 0..{cfg.vocab_size - 1}; use None to generate on (generate).",
        )
    size = 1 << max(len(ids) - 1, 0).bit_length()
    return np.array(ids + [-1] * (size - len(ids)), np.int32)


def checked_sampling(
    cfg: ModelConfig, num_prompts: int, *, temperature: Any, top_k: Any, top_p: Any, seed: Any
) -> Sampling | None:
    """One entry a prompt; None when every prompt is to be completed by its likeliest tokens."""
    temperatures = _numbers("temperature", temperature, num_prompts, Real)
    top_ks = _numbers("top_k", top_k, num_prompts, Integral)
    top_ps = _numbers("top_p", top_p, num_prompts, Real)
    seeds = _numbers("seed", seed, num_prompts, Integral)
    for name, value in temperatures:
        check(value >= 0, f"{name}={value} must be at least 0; use 0 for greedy (generate).")
    for name, value in top_ks:
        check(value >= 0, f"{name}={value} is negative; use 0 to allow every token (generate).")
    for name, value in top_ps:
        check(0 < value <= 1, f"{name}={value} must lie in (0, 1]; 1 allows every token (generate).")
    for name, value in seeds:
        check(-(2**31) <= value < 2**32, f"{name}={value} has more than 32 bits; use 0..2^32-1 (generate).")
    if all(value == 0 for _, value in temperatures):
        return None
    return Sampling(
        temperature=np.array([value for _, value in temperatures], np.float32),
        top_k=np.array([min(value, cfg.vocab_size) for _, value in top_ks], np.int32),
        top_p=np.array([value for _, value in top_ps], np.float32),
        min_p=np.zeros(num_prompts, np.float32),
        seed=np.array([value % 2**32 for _, value in seeds], np.uint32),
    )


def _numbers(name: str, given: Any, num_prompts: int, kind: type) -> list[tuple[str, Any]]:
    """(what a message calls it, number) of each prompt, from one number for all or one for each."""
    values = np.asarray(given).tolist()
    if isinstance(values, list):
        named = [(f"{name}[{row}]", value) for row, value in enumerate(values)]
    else:
        named = [(name, values)] * num_prompts
    check(
        len(named) == num_prompts,
        f"{name} has {len(named)} entries for {num_prompts} prompts; give one number for all, or one for each.",
    )
    what = "a whole number" if kind is Integral else "a number"
    for one, value in named:
        check(isinstance(value, kind), f"{one}={value!r} is not {what}; give one number for all, or one for each.")
    return named
