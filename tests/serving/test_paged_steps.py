"""Serving from pages equals serving from contiguous rows, token for token."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.model.functions import functions_for
from dsv3_jax.serving import steps
from dsv3_jax.serving.paged_cache import PagedCache, empty_pages
from dsv3_jax.serving.paged_steps import extends, paged_decode, paged_extend, paged_prefill
from dsv3_kernels import dispatch

FLOAT32 = functions_for("float32")
BFLOAT16 = functions_for("bfloat16")

STATIC = ("cfg", "functions", "implementation")
contiguous_prefill = jax.jit(steps.prefill, static_argnames=("cfg", "cache_size", "functions"))
contiguous_decode = jax.jit(steps.decode, static_argnames=("cfg", "functions"))
prefill_step = jax.jit(paged_prefill, static_argnames=STATIC, donate_argnames="cache")
extend_step = jax.jit(paged_extend, static_argnames=STATIC, donate_argnames="cache")
decode_step = jax.jit(paged_decode, static_argnames=STATIC, donate_argnames="cache")


class Tiny(NamedTuple):
    cfg: ModelConfig
    weights: Any
    expected: Any
    variables: Any


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_b", "tiny_c", "tiny_d")]
each_in_time = pytest.mark.parametrize("tiny", ["tiny_a", *SLOW], indirect=True)
one_of_them = pytest.mark.parametrize("tiny", ["tiny_a"], indirect=True)


@pytest.fixture(scope="module")
def tiny(request, golden: Path) -> Tiny:
    folder = golden / "hf" / request.param
    cfg, variables = load_pretrained(folder)
    return Tiny(
        cfg, steps.decoding_weights(cfg, variables, functions=FLOAT32), np.load(folder / "expected.npz"), variables
    )


def fresh_cache(cfg: ModelConfig, B: int, columns: int, dtype=jnp.float32, seed: int = 0) -> PagedCache:
    """Shuffled pages full of NaN, and a few that nobody owns."""
    num_pages = B * columns + 3
    pages = empty_pages(cfg, num_pages, dtype)
    pages = pages | 255 if dtype == jnp.uint8 else jnp.full_like(pages, jnp.nan)
    ids = np.random.default_rng(seed).permutation(num_pages)[: B * columns].reshape(B, columns)
    return PagedCache(pages, jnp.asarray(ids, jnp.int32), jnp.zeros(B, jnp.int32))


def everyone(B: int, count: int) -> jax.Array:
    return jnp.full(B, count, jnp.int32)


@each_in_time
@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
def test_greedy_ids_of_the_golden_checkpoints(tiny: Tiny, implementation: str) -> None:
    """Prefill, then one token a step; the logits of every step too."""
    prompt = jnp.asarray(tiny.expected["prompt_ids"], jnp.int32)
    B, T = prompt.shape
    cache = fresh_cache(tiny.cfg, B, 2)
    settings = {"functions": FLOAT32, "implementation": implementation}
    cache, (logits, *_) = prefill_step(tiny.cfg, tiny.weights, prompt, everyone(B, T), cache, **settings)
    for i in range(16):
        np.testing.assert_allclose(logits, tiny.expected["generated_step_logits"][:, i], atol=1e-4)
        token = logits.argmax(-1).astype(jnp.int32)
        np.testing.assert_array_equal(token, tiny.expected["generated_ids"][:, i])
        cache, (logits, *_) = decode_step(tiny.cfg, tiny.weights, token[:, None], everyone(B, 1), cache, **settings)
        logits = logits[:, 0]
    np.testing.assert_array_equal(cache.lengths, T + 16)


LENGTHS = (5, 60, 64, 97)
"""Of one batch: within a page, just before its end, a full page, past one."""


@pytest.fixture(scope="module")
def unequal(tiny: Tiny):
    """Prompts of unequal lengths and eight tokens more of each, with the logits of the contiguous cache behind them."""
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, tiny.cfg.vocab_size, n + 8).astype(np.int32) for n in LENGTHS]
    width = max(LENGTHS)
    padding = np.array([width - n for n in LENGTHS], np.int32)
    tokens = np.stack([np.pad(row[:n], (width - n, 0)) for row, n in zip(rows, LENGTHS)])
    cache, logits = contiguous_prefill(
        tiny.cfg, tiny.variables, tokens, padding, cache_size=width + 8, functions=FLOAT32
    )
    all_logits = [logits]
    for i in range(8):
        following = np.array([row[n + i] for row, n in zip(rows, LENGTHS)])
        cache, logits = contiguous_decode(tiny.cfg, tiny.weights, following, cache, functions=FLOAT32)
        all_logits.append(logits)
    return rows, np.stack(all_logits, axis=1)


def prefilled(tiny: Tiny, rows, chunk: int, step=prefill_step) -> tuple[PagedCache, np.ndarray]:
    """The prompts read `chunk` tokens at a time; logits behind each sequence's last token."""
    cache = fresh_cache(tiny.cfg, len(LENGTHS), 2)
    last = [None] * len(LENGTHS)
    for start in range(0, max(LENGTHS), chunk):
        counts = np.clip(np.array(LENGTHS) - start, 0, chunk).astype(np.int32)
        tokens = np.stack([np.resize(row[start : start + n], chunk) if n else np.zeros(chunk, np.int32)
                           for row, n in zip(rows, counts)])  # fmt: skip
        cache, (logits, *_) = step(tiny.cfg, tiny.weights, tokens, counts, cache, functions=FLOAT32)
        for b, count in enumerate(counts):
            last[b] = np.asarray(logits[b]) if count else last[b]
    return cache, np.stack(last)


@each_in_time
@pytest.mark.parametrize(("step", "chunk"), [(prefill_step, 97), (prefill_step, 40), (extend_step, 40)])
def test_prompts_may_come_in_chunks(tiny: Tiny, unequal, step, chunk: int) -> None:
    """In the naive form and in the absorbed one; a chunk is not full for every sequence."""
    rows, expected = unequal
    cache, logits = prefilled(tiny, rows, chunk, step)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    np.testing.assert_allclose(logits, expected[:, 0], atol=1e-4)


@each_in_time
@pytest.mark.parametrize("tokens_a_step", [1, 2])
def test_steps_of_any_size_give_the_logits_of_the_contiguous_cache(tiny: Tiny, unequal, tokens_a_step: int) -> None:
    """Lengths cross pages at different steps; the likeliest token agrees at each."""
    rows, expected = unequal
    cache, _ = prefilled(tiny, rows, 97)
    B, S = len(LENGTHS), tokens_a_step
    for i in range(0, 8, S):
        tokens = np.stack([row[n + i : n + i + S] for row, n in zip(rows, LENGTHS)])
        cache, (logits, *_) = decode_step(tiny.cfg, tiny.weights, tokens, everyone(B, S), cache, functions=FLOAT32)
        np.testing.assert_allclose(logits, expected[:, i + 1 : i + 1 + S], atol=1e-4)
        np.testing.assert_array_equal(logits.argmax(-1), expected[:, i + 1 : i + 1 + S].argmax(-1))


@one_of_them
def test_who_sits_out_keeps_his_cache(tiny: Tiny, unequal) -> None:
    """Two sequences pause for a step, and then go on as if there had been none."""
    rows, expected = unequal
    cache, _ = prefilled(tiny, rows, 97)
    tokens = np.stack([row[n : n + 1] for row, n in zip(rows, LENGTHS)])
    for counts in ([1, 0, 1, 0], [0, 1, 0, 1]):
        active = np.array(counts, np.int32)
        cache, (logits, *_) = decode_step(tiny.cfg, tiny.weights, tokens, active, cache, functions=FLOAT32)
        np.testing.assert_allclose(logits[active == 1, 0], expected[active == 1, 1], atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, np.array(LENGTHS) + 1)


@one_of_them
def test_a_step_tells_hidden_states_and_loads(tiny: Tiny) -> None:
    """Of the tokens that there are: padding goes to no expert."""
    prompt = jnp.asarray(tiny.expected["prompt_ids"], jnp.int32)
    B, T = prompt.shape
    cache = fresh_cache(tiny.cfg, B, 2)
    _, step = prefill_step(tiny.cfg, tiny.weights, prompt, everyone(B, T - 2), cache, functions=FLOAT32)
    assert step.hidden.shape == (B, T, tiny.cfg.model_dim)
    head = np.asarray(tiny.weights["params"]["unembed"]["w"])
    np.testing.assert_allclose(step.hidden[:, T - 3] @ head, step.logits, rtol=1e-5, atol=1e-5)
    assert step.load.shape == (tiny.cfg.num_moe_layers, tiny.cfg.moe.num_experts)
    np.testing.assert_array_equal(step.load.sum(-1), B * (T - 2) * tiny.cfg.moe.top_k)


def test_the_absorbed_form_is_chosen_where_it_multiplies_less() -> None:
    cfg = ModelConfig()
    assert extends(cfg, 170)
    assert not extends(cfg, 171)


@one_of_them
def test_lengths_compile_nothing(tiny: Tiny, unequal) -> None:
    before = decode_step._cache_size()
    cache = fresh_cache(tiny.cfg, 4, 2)
    token = np.zeros((4, 1), np.int32)
    for lengths in ([0, 1, 2, 3], [63, 64, 65, 126]):
        cache = cache._replace(lengths=np.array(lengths, np.int32))
        cache, _ = decode_step(tiny.cfg, tiny.weights, token, everyone(4, 1), cache, functions=FLOAT32)
    assert decode_step._cache_size() - before <= 1


@one_of_them
@pytest.mark.slow
def test_bfloat16_pages_stay_near_float32(tiny: Tiny, unequal) -> None:
    rows, _ = unequal
    prompt = np.stack([row[:5] for row in rows])
    results = []
    for functions in (FLOAT32, BFLOAT16):
        cache = fresh_cache(tiny.cfg, 4, 1, functions.compute_dtype)
        params = jax.tree.map(
            lambda leaf, functions=functions: leaf.astype(functions.param_dtype), tiny.weights["params"]
        )
        weights = {**tiny.weights, "params": params}
        cache, _ = prefill_step(tiny.cfg, weights, prompt, everyone(4, 5), cache, functions=functions)
        next_tokens = np.stack([row[5:6] for row in rows])
        cache, (logits, *_) = decode_step(tiny.cfg, weights, next_tokens, everyone(4, 1), cache, functions=functions)
        assert cache.pages.dtype == functions.compute_dtype
        results.append(np.asarray(logits))
    assert np.linalg.norm(results[1] - results[0]) < 0.1 * np.linalg.norm(results[0])


@one_of_them
def test_one_plan_serves_all_layers(tiny: Tiny) -> None:
    step = partial(paged_decode, tiny.cfg, functions=FLOAT32)
    arguments = tiny.weights, jnp.zeros((2, 1), jnp.int32), everyone(2, 1), fresh_cache(tiny.cfg, 2, 1)
    program = jax.make_jaxpr(step)(*arguments)
    loops = [str(each) for each in program.eqns if each.primitive.name == "scan"]
    assert all("name='mla_decode'" in loop and "name='plan_decode'" not in loop for loop in loops)
    assert loops
    assert str(program).count("name='plan_decode'") == 1


@one_of_them
@pytest.mark.parametrize("step", [prefill_step, decode_step], ids=["prefill", "decode"])
def test_a_kernel_that_cannot_run_here_says_so(tiny: Tiny, step) -> None:
    if dispatch.why_no_pallas() is None:
        pytest.skip("a Hopper GPU is here")
    cache = fresh_cache(tiny.cfg, 1, 1)
    settings = {"functions": FLOAT32, "implementation": "pallas"}
    with pytest.raises(NotImplementedError, match=r"cache_write\(implementation=\"pallas\"\)"):
        step(tiny.cfg, tiny.weights, np.zeros((1, 1), np.int32), everyone(1, 1), cache, **settings)
