"""Every number that independent implementations computed for four small official checkpoints.

Tolerances for float32 with highest matmul precision: logits and layer outputs 1e-4, router weights 1e-5, loss 1e-5,
gradients 1e-4 of the largest entry; choices and generated ids exact.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.convert import to_official
from dsv3_jax.interop.hf_names import entries, flatten
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.layers import attention, feed_forward
from dsv3_jax.model.mla import Latents, latents
from dsv3_jax.model.moe.layer import Routing
from dsv3_jax.model.moe.router import router_logits
from dsv3_jax.model.parts import embed, rms_norm
from dsv3_jax.model.rope import inverse_frequencies, softmax_scale
from dsv3_jax.model.transformer import Output, context, forward, hidden_states
from dsv3_jax.serving.generate import _prefill, bucket, generate
from dsv3_jax.serving.steps import decode, decoding_weights
from dsv3_jax.training.loss import next_token_loss

FLOAT32 = functions_for("float32")
ALL = ("tiny_a", "tiny_b", "tiny_c", "tiny_d")
each_in_time = pytest.mark.parametrize(
    "case",
    ["tiny_a", "tiny_d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_b", "tiny_c"))],
    indirect=True,
    scope="module",
)
"""For what is compiled long."""


class Case(NamedTuple):
    name: str
    cfg: ModelConfig
    variables: Any
    expected: Any


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    folder = golden / "hf" / request.param
    cfg, variables = load_pretrained(folder)
    return Case(request.param, cfg, variables, np.load(folder / "expected.npz"))


def layer_of(case: Case, layer: int) -> tuple[dict, jax.Array | None]:
    """Parameters and router bias of one layer of the main model."""
    params = case.variables["params"]
    if layer < case.cfg.num_dense_layers:
        return jax.tree.map(lambda leaf: leaf[layer], params["dense_layers"]), None
    index = layer - case.cfg.num_dense_layers
    bias = case.variables["router_state"]["moe_layers"]["moe"]["router"]["bias"][index]
    return jax.tree.map(lambda leaf: leaf[index], params["moe_layers"]), bias


class LayerParts(NamedTuple):
    attn_out: jax.Array
    mlp_out: jax.Array
    out: jax.Array
    latents: Latents
    routing: Routing | None
    router_logits: jax.Array | None


@partial(jax.jit, static_argnums=0)
def layer_parts(cfg: ModelConfig, params, bias, x, positions) -> LayerParts:
    """One layer, dense where there is no router; compiled once for each kind."""
    ctx = context(cfg, x.shape[:2], positions)
    normed = rms_norm(x, params["attn_norm"]["scale"], eps=cfg.norm_eps)
    cached = latents(params["mla"], FLOAT32.project(normed, params["mla"]["kv_down"]), ctx.rope, cfg=cfg)
    attn_out, _ = attention(params, x, ctx, None, cfg=cfg, functions=FLOAT32)
    mlp_out, routing = feed_forward(params, bias, x + attn_out, ctx, cfg=cfg, functions=FLOAT32)
    logits = None
    if routing is not None:
        normed = rms_norm(x + attn_out, params["ffn_norm"]["scale"], eps=cfg.norm_eps)
        logits = router_logits(params["moe"]["router"], normed)
    return LayerParts(attn_out, mlp_out, x + attn_out + mlp_out, cached, routing, logits)


@partial(jax.jit, static_argnums=0)
def run_forward(cfg: ModelConfig, variables, tokens, positions, segment_ids) -> Output:
    """`forward`, shared by the tests with and without padding."""
    return forward(cfg, variables, tokens, positions, segment_ids)


def close(actual, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def test_rope_frequencies_and_softmax_scale(case: Case) -> None:
    cfg = case.cfg
    frequencies = inverse_frequencies(cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)
    np.testing.assert_allclose(frequencies, case.expected["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(softmax_scale(cfg.mla, cfg.yarn), case.expected["softmax_scale"], rtol=1e-6)


def test_every_part_of_every_layer(case: Case) -> None:
    cfg, expected = case.cfg, case.expected
    tokens, positions, N = jnp.asarray(expected["input_ids"]), expected["position_ids"], expected["input_ids"].size
    x = embed(case.variables["params"]["embed"], tokens, functions=FLOAT32)
    close(x, expected["embed_out"], 1e-6)
    for layer in range(cfg.num_layers):
        params, bias = layer_of(case, layer)
        parts = layer_parts(cfg, params, bias, x, positions)
        close(parts.attn_out, expected[f"layer{layer}_attn_out"], 1e-4)
        close(parts.mlp_out, expected[f"layer{layer}_mlp_out"], 1e-4)
        close(parts.out, expected[f"layer{layer}_out"], 1e-4)
        close(parts.latents.kv, expected[f"cache{layer}_ckv"], 1e-4)
        close(parts.latents.k_rope, expected[f"cache{layer}_kpe"], 1e-4)
        x = parts.out
        if parts.routing is None or parts.router_logits is None:
            continue
        close(parts.router_logits.reshape(N, -1), expected[f"router{layer}_logits"].reshape(N, -1), 1e-4)
        dense = np.zeros((N, cfg.moe.num_experts), np.float32)
        np.put_along_axis(dense, np.asarray(parts.routing.ids), np.asarray(parts.routing.weights), axis=-1)
        close(dense, expected[f"router{layer}_dense"].reshape(N, -1), 1e-5)
        ids = np.sort(np.asarray(parts.routing.ids), axis=-1)
        np.testing.assert_array_equal(ids, expected[f"router{layer}_indices"].reshape(N, -1))
        assert int(parts.routing.load.sum()) == N * cfg.moe.top_k
    scale = case.variables["params"]["final_norm"]["scale"]
    close(rms_norm(x, scale, eps=cfg.norm_eps), expected["final_norm_out"], 1e-4)


def test_forward_gives_logits_and_one_router_row_a_layer(case: Case) -> None:
    cfg, expected = case.cfg, case.expected
    one_document = np.ones_like(expected["leftpad_attention_mask"])
    out = run_forward(cfg, case.variables, expected["input_ids"], expected["position_ids"], one_document)
    close(out.logits, expected["logits"], 1e-4)
    close(out.logits, expected["logits_f64"], 1e-4)
    for row, layer in enumerate(range(cfg.num_dense_layers, cfg.num_layers)):
        ids, weights = np.asarray(out.router.ids[row]), np.asarray(out.router.weights[row])
        order = np.argsort(ids, axis=-1)
        np.testing.assert_array_equal(
            np.take_along_axis(ids, order, -1).ravel(), expected[f"router{layer}_indices"].ravel()
        )
        close(np.take_along_axis(weights, order, -1).ravel(), expected[f"router{layer}_weights"].ravel(), 1e-5)
        np.testing.assert_array_equal(out.router.load[row], np.bincount(ids.ravel(), minlength=cfg.moe.num_experts))


def test_left_padding_changes_nothing_for_real_tokens(case: Case) -> None:
    expected = case.expected
    mask = expected["leftpad_attention_mask"]
    out = run_forward(case.cfg, case.variables, expected["input_ids"], expected["leftpad_position_ids"], mask)
    seen = mask.astype(bool)
    close(np.asarray(out.logits)[seen], expected["leftpad_logits"][seen], 1e-4)
    assert int(out.router.load[0].sum()) == int(mask.sum()) * case.cfg.moe.top_k


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg: ModelConfig, variables, tokens, labels):
    """Mean over labels ≥ 0 of the next token's negative log-likelihood, without segment ids."""

    def mean_loss(params) -> jax.Array:
        states = hidden_states(cfg, {**variables, "params": params}, tokens, with_mtp=False)
        weights = (labels >= 0).astype(jnp.float32)
        total = next_token_loss(states.hidden, params["unembed"]["w"], labels, weights, chunk_size=16)
        return total / weights.sum()

    return jax.value_and_grad(mean_loss)(variables["params"])


def shifted(labels: np.ndarray) -> np.ndarray:
    """Label t+1 at row t, -100 at the end."""
    return np.concatenate([labels[:, 1:], np.full((labels.shape[0], 1), -100, np.int32)], axis=1)


@each_in_time
def test_loss_and_gradients(case: Case) -> None:
    cfg, expected = case.cfg, case.expected
    loss, grads = loss_and_gradients(cfg, case.variables, expected["input_ids"], shifted(expected["input_ids"]))
    close(loss, expected["loss"], 1e-5)
    flat = flatten({"params": grads})
    norms = dict(zip(expected["grad_norm_names"].tolist(), expected["grad_norms"], strict=True))
    seen = set()
    for entry in entries(cfg):
        if entry.path not in flat or entry.key not in norms or entry.is_copy:
            continue
        actual = to_official(np.asarray(flat[entry.path][entry.index]), entry.input_axes)
        np.testing.assert_allclose(np.linalg.norm(actual.astype(np.float64)), norms[entry.key], rtol=1e-4, atol=1e-7)
        if f"grad/{entry.key}" in expected:
            golden = expected[f"grad/{entry.key}"]
            close(actual, golden, 1e-4 * np.abs(golden).max())
        seen.add(entry.key)
    assert seen == set(norms), f"no gradient of ours for {sorted(set(norms) - seen)}"


@each_in_time
def test_masked_loss(case: Case) -> None:
    labels = shifted(case.expected["labels_masked"])
    loss, _ = loss_and_gradients(case.cfg, case.variables, case.expected["input_ids"], labels)
    close(loss, case.expected["loss_masked"], 1e-5)


@each_in_time
def test_greedy_generation_is_exact(case: Case) -> None:
    prompt, expected = case.expected["prompt_ids"], case.expected["generated_ids"]
    np.testing.assert_array_equal(generate(case.cfg, case.variables, prompt, max_new_tokens=16), expected)


@partial(jax.jit, static_argnames=("cfg", "functions"))
def step(cfg, variables, tokens, cache, *, functions):
    return decode(cfg, decoding_weights(cfg, variables, functions=functions), tokens, cache, functions=functions)


def test_logits_of_every_generation_step(case: Case) -> None:
    """Through the shapes, and so the compiled prefill, of `generate`: prompts are padded on the left to a bucket."""
    cfg, prompt, steps = case.cfg, case.expected["prompt_ids"], case.expected["generated_step_logits"]
    size = bucket(prompt.shape[1])
    padding = np.full(len(prompt), size - prompt.shape[1], np.int32)
    tokens = np.pad(prompt, ((0, 0), (size - prompt.shape[1], 0))).astype(np.int32)
    cache, logits = _prefill(cfg, case.variables, tokens, padding, cache_size=bucket(size + 16), functions=FLOAT32)
    for i in range(16):
        close(logits, steps[:, i], 1e-4)
        cache, logits = step(cfg, case.variables, case.expected["generated_ids"][:, i], cache, functions=FLOAT32)


def test_mtp_logits_of_the_official_order(case: Case) -> None:
    if case.cfg.mtp_depth == 0:
        pytest.skip("no MTP module in this checkpoint")
    expected = case.expected
    one_document = np.ones_like(expected["leftpad_attention_mask"])
    out = run_forward(case.cfg, case.variables, expected["input_ids"], expected["position_ids"], one_document)
    close(out.mtp_logits[0], expected["mtp_logits"], 1e-4)
    close(out.mtp_logits[0], expected["mtp_logits_f64"], 1e-4)
    log_probabilities = jax.nn.log_softmax(out.mtp_logits[0][:, :-1])
    labels = expected["input_ids"][:, 2:]
    loss = -np.take_along_axis(np.asarray(log_probabilities), labels[..., None], axis=-1).mean()
    close(loss, expected["mtp_loss"], 1e-5)
    assert np.abs(np.asarray(out.mtp_logits[0]) - expected["mtp_logits_swapped_concat_wrong"]).max() > 0.1
