"""Completion of a batch of prompts, jitted once for each bucket of shapes."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.serving.latent_cache import LatentCache
from dsv3_jax.serving.request import checked_prompts, checked_sampling, checked_stop_ids
from dsv3_jax.serving.sampler import Sampling, logprobs_of, sample
from dsv3_jax.serving.steps import decode, decoding_weights, prefill
from dsv3_jax.typing import AnyArray, Array, Bool, Float, Int, Variables


def generate(
    cfg: ModelConfig,
    variables: Variables,
    prompt_ids: Int[AnyArray, "B T"] | Sequence[Sequence[int]],
    max_new_tokens: int = 16,
    *,
    temperature: float | Sequence[float] | AnyArray = 0.0,
    top_k: int | Sequence[int] | AnyArray = 0,
    top_p: float | Sequence[float] | AnyArray = 1.0,
    seed: int | Sequence[int] | AnyArray = 0,
    eos_id: int | Sequence[int] | None = None,
    return_logprobs: bool = False,
    functions: Functions | None = None,
) -> Any:
    """Completes each prompt by `max_new_tokens` tokens; greedy unless `temperature` > 0.

    `temperature`, `top_k`, `top_p` and `seed` are one value for all prompts, or B values, one for each. A token is
    drawn with its sequence's own seed and its position in it: a sequence gets the same tokens alone, in any batch and
    in any row. So a prompt given n times gets n different completions with n seeds, such as `seed=range(n)`.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}`.
        prompt_ids: int[B, T], or B lists of any lengths ≥ 1.
        max_new_tokens: at least 1; prompt and completion together fit in `cfg.max_position`.
        temperature: 0 for the likeliest token, else the softmax temperature.
        top_k: only the k likeliest tokens; 0 allows all.
        top_p: only the smallest set of tokens with at least this probability; 1 allows all.
        seed: of the sampling, below 2^32.
        eos_id: the id that ends a sequence, or several (`interop.stop_tokens.stop_ids` gives those of a folder). A
            sequence that produced one is filled up with it, and generation stops when all have.
        return_logprobs: also return the tokens' log-probabilities under the model's own distribution, softmax(logits):
            before temperature, top_k and top_p. 0 behind the end of a sequence, so a
            row's sum is the log-probability of its completion.
        functions: what a layer is made of; default: `functions_of` the dtype that the parameters have.

    Returns:
        int32[B, max_new_tokens], without the prompt; with `return_logprobs`, (ids, float32[B, max_new_tokens]).

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, a length past `cfg.max_position`, or a
            sampling parameter out of range or of another length than the prompts.
    """
    prompts = checked_prompts(cfg, prompt_ids, max_new_tokens)
    sampling = checked_sampling(cfg, len(prompts), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stop_ids = checked_stop_ids(cfg, eos_id)
    functions = functions or functions_of(variables["params"]["embed"]["w"].dtype)
    tokens, padding = _padded(prompts)
    cache_size = bucket(tokens.shape[1] + max_new_tokens)
    cache, logits = _prefill(cfg, variables, tokens, padding, cache_size=cache_size, functions=functions)
    ids, logprobs = _complete(
        cfg,
        variables,
        cache,
        logits,
        np.int32(max_new_tokens),
        stop_ids,
        sampling,
        with_logprobs=return_logprobs,
        functions=functions,
    )
    ids = np.asarray(ids)[:, :max_new_tokens]
    return ids if logprobs is None else (ids, np.asarray(logprobs)[:, :max_new_tokens])


def bucket(size: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, 48, 56, 64, …: four sizes an octave, so at most a quarter is wasted."""
    sizes = (quarter << octave for octave in itertools.count(2) for quarter in range(4, 8))
    return next(candidate for candidate in sizes if candidate >= size)


def _padded(prompts: list[np.ndarray]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """The prompts padded on the left to a bucket, and by how much."""
    size = bucket(max(len(prompt) for prompt in prompts))
    padding = np.array([size - len(prompt) for prompt in prompts], np.int32)
    return np.stack([np.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, padding, strict=True)]), padding


@partial(jax.jit, static_argnames=("cfg", "cache_size", "functions"))
def _prefill(cfg, variables, tokens, padding, *, cache_size: int, functions: Functions):
    return prefill(cfg, variables, tokens, padding, cache_size=cache_size, functions=functions)


class _Progress(NamedTuple):
    """The first `step` tokens of each completion."""

    step: Int[Array, ""]
    cache: LatentCache
    last: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    ids: Int[Array, "B S"]
    logprobs: Float[Array, "B S"] | None


@partial(jax.jit, static_argnames=("cfg", "with_logprobs", "functions"))
def _complete(
    cfg: ModelConfig,
    variables: Variables,
    cache: LatentCache,
    logits: Float[Array, "B V"],
    num_tokens: Int[AnyArray, ""],
    stop_ids: Int[AnyArray, "K"],
    sampling: Sampling | None,
    *,
    with_logprobs: bool,
    functions: Functions,
) -> tuple[Int[Array, "B S"], Float[Array, "B S"] | None]:
    """The whole loop on the device: its trip count is data, so any `num_tokens` shares one compilation.

    A sequence that is done repeats its last token, also in the columns that the loop did not reach.
    """

    def extend(now: _Progress, cache: LatentCache, logits: Float[Array, "B V"]) -> _Progress:
        token = jnp.where(now.is_done, now.last, sample(logits, cache.length - cache.padding, sampling))
        logprobs = None
        if now.logprobs is not None:
            column = jnp.where(now.is_done, 0.0, logprobs_of(logits, token))
            logprobs = jax.lax.dynamic_update_slice(now.logprobs, column[:, None], (0, now.step))
        ids = jax.lax.dynamic_update_slice(now.ids, token[:, None], (0, now.step))
        is_done = now.is_done | (token[:, None] == stop_ids[None, :]).any(axis=-1)
        return _Progress(now.step + 1, cache, token, is_done, ids, logprobs)

    def has_more(now: _Progress) -> Bool[Array, ""]:
        return (now.step < num_tokens) & ~now.is_done.all()

    def one_more(now: _Progress) -> _Progress:
        return extend(now, *decode(cfg, weights, now.last, now.cache, functions=functions))

    weights = decoding_weights(cfg, variables, functions=functions)
    _, B, S, _ = cache.rows.shape
    nothing = jnp.zeros(B, jnp.int32)
    ids, logprobs = jnp.zeros((B, S), jnp.int32), jnp.zeros((B, S), jnp.float32) if with_logprobs else None
    start = _Progress(jnp.int32(0), cache, nothing, jnp.zeros(B, bool), ids, logprobs)
    end = jax.lax.while_loop(has_more, one_more, extend(start, cache, logits))
    return jnp.where(jnp.arange(S) < end.step, end.ids, end.last[:, None]), end.logprobs
