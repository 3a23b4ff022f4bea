"""Multi-token prediction against a reference that computes one position at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.mla import latents, queries
from dsv3_jax.model.moe.layer import moe
from dsv3_jax.model.rope import rope_table, softmax_scale
from dsv3_jax.model.transformer import forward, hidden_states

FLOAT32 = functions_for("float32")

B, T = 2, 9


def norm(x: np.ndarray, scale, eps: float) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def slow_mtp(cfg, variables, hidden, tokens, positions, segments) -> tuple[dict, np.ndarray]:
    """{(k, b, i): state of depth k at row i} for the rows that exist, and each depth's load. Single positions only."""
    params, E = variables["params"], np.asarray(variables["params"]["embed"]["w"], np.float64)
    module_of = [jax.tree.map(lambda leaf, k=k: leaf[k], params["mtp"]) for k in range(cfg.mtp_depth)]
    scale, eps = softmax_scale(cfg.mla, cfg.yarn), cfg.norm_eps

    @jax.jit
    def project(mla_params, x_D, position):
        rope = rope_table(position[None, None], rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)
        x = x_D[None, None]
        q = jnp.concatenate(queries(mla_params, x, rope, cfg=cfg, functions=FLOAT32), -1)[0, 0]
        stored = latents(mla_params, FLOAT32.project(x, mla_params["kv_down"]), rope, cfg=cfg)
        return q, stored.kv[0, 0], stored.k_rope[0, 0]

    @jax.jit
    def feed_forward(moe_params, bias, x_D):
        out, routing = moe(moe_params, bias, x_D[None, None], None, cfg=cfg.moe, functions=FLOAT32)
        return out[0, 0], routing.load

    states, loads = {}, np.zeros((cfg.mtp_depth, cfg.moe.num_experts), int)
    previous = {(b, i): np.asarray(hidden[b, i], np.float64) for b in range(B) for i in range(T)}
    for k, module in enumerate(module_of, start=1):
        bias = variables["router_state"]["mtp"]["block"]["moe"]["router"]["bias"][k - 1]
        block, proj = module["block"], np.asarray(module["proj"]["w"], np.float64)
        up = np.asarray(block["mla"]["kv_up"], np.float64)
        current = {}
        for b in range(B):
            memory = []
            for i in range(T - k):
                inside = segments is None or (segments[b, i] == segments[b, i + k] != 0)
                if not inside:
                    continue
                if segments is not None and memory and segments[b, memory[-1][0]] != segments[b, i]:
                    memory = []
                embedded = norm(E[tokens[b, i + k]], module["embed_norm"]["scale"], eps)
                carried = norm(previous[b, i], module["hidden_norm"]["scale"], eps)
                x = np.concatenate([embedded, carried]) @ proj
                normed = norm(x, block["attn_norm"]["scale"], eps)
                q, kv, k_rope = project(block["mla"], jnp.asarray(normed, jnp.float32), positions[b, i])
                memory.append((i, np.asarray(kv, np.float64), np.asarray(k_rope, np.float64)))
                heads = []
                for h in range(cfg.mla.num_heads):
                    keys = [np.concatenate([c @ up[:, h, : cfg.mla.nope_head_dim], r]) for _, c, r in memory]
                    values = [c @ up[:, h, cfg.mla.nope_head_dim :] for _, c, _ in memory]
                    scores = np.array(keys) @ np.asarray(q[h], np.float64) * scale
                    p = np.exp(scores - scores.max())
                    heads.append((p / p.sum()) @ np.array(values))
                x = x + np.einsum("hw,hwd->d", np.array(heads), np.asarray(block["mla"]["out"], np.float64))
                normed = norm(x, block["ffn_norm"]["scale"], eps)
                added, load = feed_forward(block["moe"], bias, jnp.asarray(normed, jnp.float32))
                loads[k - 1] += np.asarray(load)
                current[b, i] = norm(x + np.asarray(added, np.float64), module["norm"]["scale"], eps)
                states[k, b, i] = current[b, i]
        previous = current
    return states, loads


def drawn(cfg, seed: int, documents: bool):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    if not documents:
        return tokens, np.tile(np.arange(T), (B, 1)), None
    segments = np.array([[1] * 5 + [2] * 3 + [0], [1] * 2 + [2] * 7])
    positions = np.array([[*range(5), *range(3), 0], [*range(2), *range(7)]])
    return tokens, positions, segments


@pytest.mark.parametrize(
    ("depth", "documents"),
    [(1, True), *(pytest.param(*which, marks=pytest.mark.slow) for which in ((1, False), (3, True), (3, False)))],
)
def test_every_depth_equals_the_slow_reference(config, variables_of, depth: int, documents: bool) -> None:
    """Depth 2 is inside depth 3. Rows whose token t+k is elsewhere are filler: they count in no load."""
    cfg = config(mtp_depth=depth)
    variables = variables_of(cfg, depth)
    tokens, positions, segments = drawn(cfg, depth, documents)
    states = jax.jit(partial(hidden_states, cfg))(variables, tokens, positions, segments)
    expected, loads = slow_mtp(cfg, variables, states.hidden, tokens, positions, segments)
    assert len(expected) > 5 * depth
    for (k, b, i), row in expected.items():
        np.testing.assert_allclose(states.mtp_hidden[k - 1, b, i], row, atol=1e-4, err_msg=f"{k=} {b=} {i=}")
    np.testing.assert_array_equal(states.mtp_routing.load, loads)
    assert states.mtp_routing.balance_loss.shape == (depth,)

    if depth < 3 or not documents:
        return  # the head is the same for all; each compilation of it takes seconds
    out = jax.jit(partial(forward, cfg))(variables, tokens, positions, segments)
    head = np.asarray(variables["params"]["unembed"]["w"], np.float64)
    assert [logits.shape for logits in out.mtp_logits] == [(B, T - k, cfg.vocab_size) for k in range(1, depth + 1)]
    for (k, b, i), row in expected.items():
        np.testing.assert_allclose(out.mtp_logits[k - 1][b, i], row @ head, atol=3e-4)


def test_gradients_of_the_deepest_module_reach_what_is_shared(config, variables_of) -> None:
    """The last token is seen by no other row, so its embedding learns from the deepest prediction alone."""
    cfg = config(mtp_depth=2)
    variables = variables_of(cfg, 1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size - 1, (1, T)).astype(np.int32)
    tokens[0, -1] = last = cfg.vocab_size - 1

    @jax.jit
    def gradient(params):
        def total(params):
            out = forward(cfg, {**variables, "params": params}, tokens)
            return jnp.sin(out.mtp_logits[1]).sum()

        return jax.grad(total)(params)

    grads = gradient(variables["params"])
    assert np.abs(grads["embed"]["w"][last]).max() > 1e-3
    assert np.abs(grads["unembed"]["w"]).min(axis=0).max() > 1e-6
    for leaf in jax.tree.leaves(grads["mtp"]):
        assert np.abs(np.asarray(leaf)).max(axis=tuple(range(1, leaf.ndim))).min() > 0


def test_the_main_model_does_not_depend_on_its_mtp_modules(config, variables_of, run_forward) -> None:
    cfg = config(mtp_depth=1)
    variables = variables_of(cfg, 2)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    main = config(mtp_depth=0)
    params = {name: leaf for name, leaf in variables["params"].items() if name != "mtp"}
    alone = run_forward(main, {"params": params, "router_state": variables["router_state"]}, tokens)
    assert alone.mtp_logits == ()
    np.testing.assert_allclose(alone.logits, run_forward(cfg, variables, tokens).logits, atol=1e-5)


def test_rows_shorter_than_the_depth_give_empty_logits(config, variables_of) -> None:
    cfg = config(mtp_depth=3)
    shapes = jax.eval_shape(partial(forward, cfg), variables_of(cfg), np.array([[5, 6]], np.int32))
    assert [logits.shape[1] for logits in shapes.mtp_logits] == [1, 0, 0]
