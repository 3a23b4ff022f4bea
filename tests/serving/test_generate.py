"""Completion equals the plain uncached forward pass, token for token, and compiles once a bucket."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.model.functions import functions_for
from dsv3_jax.serving import generate as module
from dsv3_jax.serving.generate import bucket, generate
from dsv3_jax.serving.request import checked_prompts, checked_sampling, checked_stop_ids

BFLOAT16 = functions_for("bfloat16")
FLOAT32 = functions_for("float32")


def prompts_of(cfg, lengths, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, cfg.vocab_size, length).tolist() for length in lengths]


def clear(logits: np.ndarray) -> bool:
    """No token was chosen by a hair: then rounding cannot explain a difference."""
    best = np.sort(logits, axis=-1)
    return bool((best[..., -1] - best[..., -2] > 1e-3).all())


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("no_q_latent", "softmax", "dense")]


@pytest.mark.parametrize("model", ["base", *OTHERS], indirect=True)
def test_ragged_prompts_equal_the_uncached_forward(model, slowly) -> None:
    """Prompts at and past the edge of a bucket, completions across the next; other edges below, with one model."""
    cfg, variables = model
    prompts = prompts_of(cfg, (17, 3, 20))
    expected, logits = slowly(cfg, variables, prompts, 12)
    assert clear(logits), "choose another seed"
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 12), expected)


@pytest.mark.parametrize("length", [15, 16, 17, 20, pytest.param(21, marks=pytest.mark.slow)])
def test_every_prompt_length_around_a_bucket_edge(base, slowly, length: int) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (length, 1, 2), length)
    expected, _ = slowly(cfg, variables, prompts, 12)
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 12), expected)


def test_rows_do_not_depend_on_their_neighbours(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (5, 11, 2))
    together = generate(cfg, variables, prompts, 12)
    for row, prompt in enumerate(prompts):
        alone = generate(cfg, variables, [prompt, prompts[0], prompts[0]], 12)
        np.testing.assert_array_equal(alone[0], together[row])


def test_one_token_and_array_prompts(base, slowly) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (7, 7, 7), 3)
    expected, _ = slowly(cfg, variables, prompts, 1)
    for given in (prompts, np.array(prompts), jnp.asarray(prompts), tuple(map(tuple, prompts))):
        out = generate(cfg, variables, given, 1)
        np.testing.assert_array_equal(out, expected)
        assert out.dtype == np.int32
        assert isinstance(out, np.ndarray)


def test_a_longer_completion_continues_a_shorter_one(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 4)
    long = generate(cfg, variables, prompts, 12)
    for count in (1, 2, 11):
        np.testing.assert_array_equal(generate(cfg, variables, prompts, count), long[:, :count])
    sampled = generate(cfg, variables, prompts, 12, temperature=1.0, seed=5)
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 9, temperature=1.0, seed=5), sampled[:, :9])


def test_seeds_are_reproducible_and_differ(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 5)
    drawn = [generate(cfg, variables, prompts, 12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    one = [prompts[0]] * 3
    assert len({tuple(row) for row in generate(cfg, variables, one, 12, temperature=1.5, seed=range(3))}) == 3
    assert len({tuple(row) for row in generate(cfg, variables, one, 12, temperature=1.5, seed=7)}) == 1


def test_a_sequence_is_sampled_the_same_in_any_batch(base) -> None:
    """Each with parameters of its own: in another row, beside others, alone, and with more padding."""
    cfg, variables = base
    prompts = np.array(prompts_of(cfg, (4, 6, 5), 9), object)
    how = {"temperature": [0.9, 0.0, 1.4], "top_k": [0, 3, 20], "top_p": [1.0, 0.5, 0.9], "seed": [11, 12, 2**32 - 1]}
    how = {name: np.array(column) for name, column in how.items()}

    def complete(rows, longest=()):
        given = {name: [*column[rows].tolist(), *column[: len(longest)].tolist()] for name, column in how.items()}
        return generate(cfg, variables, [*prompts[rows], *longest], 9, **given)

    together = complete([0, 1, 2])
    for rows in ([2, 0, 1], [1, 1, 0], [0]):
        np.testing.assert_array_equal(complete(rows), together[rows])
    np.testing.assert_array_equal(complete([0, 2], prompts_of(cfg, (20,)))[:2], together[[0, 2]])
    np.testing.assert_array_equal(together[1], generate(cfg, variables, list(prompts), 9)[1])
    assert (together != generate(cfg, variables, list(prompts), 9)).any(axis=1).tolist() == [True, False, True]


def test_logprobs_are_those_of_the_uncached_forward(base, uncached_logits) -> None:
    """Whatever temperature and cuts; 0 behind the end."""
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 7)
    how = {"temperature": [0.0, 1.3, 0.6], "top_k": [0, 9, 0], "top_p": [1.0, 1.0, 0.9], "seed": 3}
    free = generate(cfg, variables, prompts, 12, **how)
    stop = int(free[1, 3])
    ids, logprobs = generate(cfg, variables, prompts, 12, eos_id=stop, return_logprobs=True, **how)
    assert logprobs.dtype == np.float32
    logits = uncached_logits(cfg, variables, [prompt + row.tolist() for prompt, row in zip(prompts, ids, strict=True)])
    expected = np.asarray(jax.nn.log_softmax(logits))
    for row, prompt in enumerate(prompts):
        hits = np.flatnonzero(free[row] == stop)
        end = hits[0] + 1 if len(hits) else 12
        np.testing.assert_array_equal(ids[row, :end], free[row, :end])
        places = len(prompt) - 1 + np.arange(end)
        np.testing.assert_allclose(logprobs[row, :end], expected[row, places, ids[row, :end]], atol=1e-4)
        np.testing.assert_array_equal(logprobs[row, end:], 0)
    assert (logprobs[1, 4:] == 0).all()


def test_every_token_is_drawn_with_a_key_of_its_own(base) -> None:
    """Where all tokens are equally likely whatever came before, one key would draw one token again and again."""
    cfg, variables = base
    params = {**variables["params"], "unembed": jax.tree.map(jnp.zeros_like, variables["params"]["unembed"])}
    drawn = generate(cfg, {**variables, "params": params}, prompts_of(cfg, (4, 6, 5), 5), 12, temperature=1.0)
    assert all(len(set(row)) >= 6 for row in drawn.tolist())


def test_sampling_that_leaves_one_token_is_greedy(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 6)
    expected = generate(cfg, variables, prompts, 9)
    for how in ({"top_k": 1}, {"top_p": 1e-6}):
        np.testing.assert_array_equal(generate(cfg, variables, prompts, 9, temperature=2.0, **how), expected)
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 9, temperature=1e-7), expected)


def test_a_finished_sequence_is_filled_with_eos(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 7)
    free = generate(cfg, variables, prompts, 12)
    eos = int(free[1, 3])
    out = generate(cfg, variables, prompts, 12, eos_id=eos)
    for row in range(3):
        hits = np.flatnonzero(free[row] == eos)
        end = hits[0] if len(hits) else 12
        np.testing.assert_array_equal(out[row, :end], free[row, :end])
        np.testing.assert_array_equal(out[row, end:], eos)
    first = int(free[0, 0])
    np.testing.assert_array_equal(generate(cfg, variables, [prompts[0]] * 3, 12, eos_id=first), first)


def test_any_of_several_ids_stops_a_sequence_which_is_filled_up_with_it(base) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (4, 6, 5), 7)
    free = generate(cfg, variables, prompts, 12)
    for stops in ([int(free[0, 2]), int(free[1, 3])], (int(free[2, 5]), int(free[0, 1]), int(free[1, 4])), [], [2]):
        out = generate(cfg, variables, prompts, 12, eos_id=stops)
        for row in range(3):
            hits = np.flatnonzero(np.isin(free[row], stops))
            end = hits[0] if len(hits) else 11
            np.testing.assert_array_equal(out[row, : end + 1], free[row, : end + 1])
            np.testing.assert_array_equal(out[row, end:], free[row, end])
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 12, eos_id=2), out)
    sizes = {len(checked_stop_ids(cfg, list(range(count)))) for count in range(9)}
    assert sizes == {1, 2, 4, 8}


def test_length_and_count_share_one_compilation_a_bucket(base) -> None:
    cfg, variables = base
    generate(cfg, variables, prompts_of(cfg, (13, 2, 3)), 3)
    before = module._complete._cache_size(), module._prefill._cache_size()
    for lengths, count in (((16, 1, 1), 2), ((1, 1, 1), 4), ((9, 16, 3), 1)):
        generate(cfg, variables, prompts_of(cfg, lengths), count)
    generate(cfg, variables, prompts_of(cfg, (5, 5, 5)), 3, eos_id=1)
    assert (module._complete._cache_size(), module._prefill._cache_size()) == before
    generate(cfg, variables, prompts_of(cfg, (5, 5, 5)), 3, temperature=1.0, top_k=5)
    sampling = module._complete._cache_size()
    generate(cfg, variables, prompts_of(cfg, (6, 5, 5)), 2, temperature=0.3, top_k=10**30, top_p=0.5, seed=2**32 - 1)
    assert module._complete._cache_size() == sampling


def test_buckets_waste_at_most_a_quarter() -> None:
    sizes = [bucket(size) for size in range(1, 2000)]
    assert sizes == sorted(sizes)
    for size, padded in enumerate(sizes, start=1):
        assert padded >= size
        assert padded == 16 or padded < 1.25 * size
    assert [bucket(size) for size in (1, 16, 17, 20, 21, 33, 64, 65)] == [16, 16, 20, 20, 24, 40, 64, 80]


@pytest.mark.slow
def test_the_last_position_can_be_reached(base, slowly) -> None:
    cfg, variables = base
    prompts = prompts_of(cfg, (47, 40, 1), 8)
    expected, _ = slowly(cfg, variables, prompts, 1)
    np.testing.assert_array_equal(generate(cfg, variables, prompts, 1), expected)


def test_a_completion_past_the_last_position_is_refused(base) -> None:
    cfg, variables = base
    with pytest.raises(ConfigError, match="prompt 0 has 60 tokens, and with max_new_tokens=5 exceeds max_position=64"):
        generate(cfg, variables, prompts_of(cfg, (60,)), 5)


BAD = {
    "no prompt": ([], {}, "prompt_ids is empty; give at least one prompt"),
    "empty prompt": ([[3], []], {}, "prompt 1 is empty; give at least one token"),
    "id too large": ([[3, 67]], {}, "prompt 0 holds the id 67, outside 0..66; is it from another tokenizer"),
    "id far too large": ([[3], [2**40]], {}, "prompt 1 holds the id 1099511627776, outside 0..66"),
    "negative id": ([[-1, 3]], {}, "prompt 0 holds the id -1, outside 0..66"),
    "no tokens": ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    "too long": ([[3]], {"max_new_tokens": 64}, "exceeds max_position=64; shorten either"),
    "negative temperature": ([[3]], {"temperature": -0.5}, "temperature=-0.5 must be at least 0; use 0 for greedy"),
    "no temperature": ([[3]], {"temperature": float("nan")}, "temperature=nan must be at least 0"),
    "top_p of zero": ([[3]], {"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    "top_p above one": ([[3]], {"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    "negative top_k": ([[3]], {"top_k": -2}, "top_k=-2 is negative; use 0 to allow every token"),
    "temperature of one": ([[3], [4]], {"temperature": [1, -0.5]}, r"temperature\[1\]=-0.5 must be at least 0"),
    "seeds for others": ([[3]], {"seed": [1, 2]}, "seed has 2 entries for 1 prompts; give one number for all, or one"),
    "foreign eos": ([[3]], {"eos_id": 67}, "eos_id=67 is outside 0..66"),
    "foreign eos among others": ([[3]], {"eos_id": [1, -1]}, "eos_id=-1 is outside 0..66"),
    "long seed": ([[3]], {"seed": 2**40}, "seed=1099511627776 has more than 32 bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_value_and_the_remedy(base, name: str) -> None:
    cfg, variables = base
    prompts, how, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        generate(cfg, variables, prompts, **how)


def test_prompts_that_are_not_integers_are_refused(base) -> None:
    with pytest.raises(ConfigError, match="prompt 1 holds float64, not integers; give token ids"):
        checked_prompts(base[0], [[3], [1.5, 2.0]], 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_k": 2.5}, "top_k=2.5 is not a whole number; give one number for all, or one for each"),
        ({"top_p": "0.9"}, "top_p='0.9' is not a number"),
        ({"temperature": [0.5, None]}, r"temperature\[1\]=None is not a number"),
        ({"seed": [[1], [2]]}, r"seed\[0\]=\[1\] is not a whole number"),
    ],
)
def test_sampling_parameters_that_are_no_numbers_are_refused(base, how, message) -> None:
    every = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": np.int32(3)}
    with pytest.raises(ConfigError, match=message):
        checked_sampling(base[0], 2, **(every | how))


@pytest.mark.slow
def test_replaced_router_core_and_experts_are_those_of_forward(base, uncached_logits) -> None:
    cfg, variables = base

    def equal_route(logits, bias, **settings):
        weights, ids = FLOAT32.route(logits, bias, **settings)
        return jnp.full_like(weights, 0.5), ids

    def flatter_attend(q, k, v, *args, scale, **how):
        return FLOAT32.attend(q, k, v, *args, scale=scale / 2, **how)

    def half_experts(gate_up, down, dispatched):
        return FLOAT32.expert_ffn(gate_up, down, dispatched) / 2

    prompts = prompts_of(cfg, (4, 6, 5), 10)
    functions = dataclasses.replace(FLOAT32, route=equal_route, attend=flatter_attend, expert_ffn=half_experts)
    ids, logprobs = generate(cfg, variables, prompts, 5, functions=functions, return_logprobs=True)
    rows = [prompt + row.tolist() for prompt, row in zip(prompts, ids, strict=True)]
    logits = uncached_logits(cfg, variables, rows, functions=functions)
    expected, usual = (jax.nn.log_softmax(found) for found in (logits, uncached_logits(cfg, variables, rows)))
    for row, prompt in enumerate(prompts):
        places = len(prompt) - 1 + np.arange(5)
        np.testing.assert_allclose(logprobs[row], expected[row, places, ids[row]], atol=1e-4)
        assert abs(logprobs[row] - usual[row, places, ids[row]]).max() > 1e-2


@pytest.mark.slow
def test_bfloat16_parameters_decide_the_arithmetic(base, variables_of) -> None:
    cfg, _ = base
    variables = variables_of(cfg, 0, jnp.bfloat16)
    out = generate(cfg, variables, prompts_of(cfg, (4, 6, 5)), 12)
    assert out.shape == (3, 12)
    assert ((out >= 0) & (out < cfg.vocab_size)).all()
    np.testing.assert_array_equal(generate(cfg, variables, prompts_of(cfg, (4, 6, 5)), 12, functions=BFLOAT16), out)
