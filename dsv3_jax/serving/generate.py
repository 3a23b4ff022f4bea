"""Completion of a batch of prompts, jitted once for each bucket of shapes."""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.precision.policy import Policy, policy_of
from dsv3_jax.serving.sampler import greedy, sample
from dsv3_jax.serving.steps import LatentCache, decode, decoding_weights, prefill
from dsv3_jax.typing import AnyArray, Array, Float, Int, Variables


def generate(
    cfg: ModelConfig,
    variables: Variables,
    prompt_ids: Int[AnyArray, "B T"] | Sequence[Sequence[int]],
    max_new_tokens: int = 16,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
    policy: Policy | None = None,
) -> np.ndarray:
    """Completes each prompt by `max_new_tokens` tokens; greedy unless `temperature` > 0.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}`.
        prompt_ids: int[B, T], or B lists of any lengths ≥ 1.
        max_new_tokens: at least 1; prompt and completion together fit in `cfg.max_position`.
        temperature: 0 for the likeliest token, else the softmax temperature.
        top_k: keep only the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        seed: of the sampling, below 2^32.
        eos_id: the id that ends a sequence, or several (`interop.stop_tokens.stop_ids` gives those of a folder). A
            sequence that produced one is filled up with it, and generation stops when all have.
        policy: dtypes of the arithmetic; default: the dtype that the parameters have.

    Returns:
        int32[B, max_new_tokens], without the prompt.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, a length past `cfg.max_position`, or a
            sampling parameter out of range.
    """
    prompts = _checked_prompts(cfg, prompt_ids, max_new_tokens)
    check(temperature >= 0, f"temperature={temperature} must be at least 0; use 0 for greedy (generate).")
    stop_ids = _checked_stop_ids(cfg, eos_id)
    check(0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]; 1 keeps every token (generate).")
    check(top_k >= 0, f"top_k={top_k} is negative; use 0 to keep every token (generate).")
    check(-(2**31) <= seed < 2**32, f"seed={seed} has more than 32 bits; use 0..2^32-1 (generate).")
    policy = policy or policy_of(variables["params"]["embed"]["w"].dtype)

    prompt_size = bucket(max(len(prompt) for prompt in prompts))
    padding = np.array([prompt_size - len(prompt) for prompt in prompts], np.int32)
    tokens = np.stack([np.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, padding, strict=True)])
    cache, logits = _prefill(
        cfg, variables, tokens, padding, cache_size=bucket(prompt_size + max_new_tokens), policy=policy
    )
    out = _complete(
        cfg,
        variables,
        cache,
        logits,
        np.int32(max_new_tokens),
        stop_ids,
        jax.random.key(seed),
        {
            "temperature": np.float32(temperature),
            "top_k": np.int32(min(top_k, cfg.vocab_size)),
            "top_p": np.float32(top_p),
        },
        is_greedy=temperature == 0,
        policy=policy,
    )
    return np.asarray(out)[:, :max_new_tokens]


def bucket(size: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, 48, 56, 64, …: four sizes an octave, so at most a quarter is wasted."""
    sizes = (quarter << octave for octave in itertools.count(2) for quarter in range(4, 8))
    return next(candidate for candidate in sizes if candidate >= size)


def _checked_prompts(cfg: ModelConfig, prompt_ids, max_new_tokens: int) -> list[np.ndarray]:
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


def _checked_stop_ids(cfg: ModelConfig, eos_id: int | Sequence[int] | None) -> Int[np.ndarray, "K"]:
    """The ids, filled up with -1, which is no token, to 1, 2, 4, ... of them: few shapes to compile."""
    ids = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Sequence) else [eos_id]
    for one in ids:
        check(
            0 <= one < cfg.vocab_size,
            f"eos_id={one} is outside 0..{cfg.vocab_size - 1}; use None to generate on (generate).",
        )
    size = 1 << max(len(ids) - 1, 0).bit_length()
    return np.array(ids + [-1] * (size - len(ids)), np.int32)


@partial(jax.jit, static_argnames=("cfg", "cache_size", "policy"))
def _prefill(cfg, variables, tokens, padding, *, cache_size: int, policy: Policy):
    return prefill(cfg, variables, tokens, padding, cache_size=cache_size, policy=policy)


@partial(jax.jit, static_argnames=("cfg", "is_greedy", "policy"))
def _complete(
    cfg: ModelConfig,
    variables: Variables,
    cache: LatentCache,
    logits: Float[Array, "B V"],
    num_tokens: Int[Array, ""],
    stop_ids: Int[Array, "K"],
    key: jax.Array,
    sampling: dict,
    *,
    is_greedy: bool,
    policy: Policy,
) -> Int[Array, "B S"]:
    """The whole loop on the device: its trip count is data, so any `num_tokens` shares one compilation.

    A sequence that is done repeats its last token, also in the columns that the loop did not reach.
    """

    def choose(logits, step):
        return greedy(logits) if is_greedy else sample(logits, jax.random.fold_in(key, step), **sampling)

    def stops(token):
        return (token[:, None] == stop_ids[None, :]).any(axis=-1)

    def more(state):
        step, _, _, is_done, _ = state
        return (step < num_tokens) & ~is_done.all()

    def one_more(state):
        step, cache, token, is_done, out = state
        cache, logits = decode(cfg, weights, token, cache, policy=policy)
        token = jnp.where(is_done, token, choose(logits, step))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        return step + 1, cache, token, is_done | stops(token), out

    weights = decoding_weights(cfg, variables)
    first = choose(logits, 0)
    out = jnp.broadcast_to(first[:, None], cache.rows.shape[1:3])
    step, _, last, _, out = jax.lax.while_loop(more, one_more, (jnp.int32(1), cache, first, stops(first), out))
    return jnp.where(jnp.arange(out.shape[1]) < step, out, last[:, None])
