"""The whole forward pass: documents, padding, causality, rematerialisation, replaceable equations."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.attention import attend_reference
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.layers import PAPER
from dsv3_jax.model.moe.router import route
from dsv3_jax.model.transformer import hidden_states

FLOAT32 = functions_for("float32")


def tokens_of(cfg, shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape).astype(np.int32)


def test_packed_documents_equal_documents_alone(config, variables_of, run_forward) -> None:
    """Logits, MTP logits inside each document, and the load of every router, with padding at the end."""
    cfg = config(mtp_depth=2)
    variables = variables_of(cfg)
    lengths, T = (7, 4), 13
    tokens = tokens_of(cfg, (1, T))
    segments = np.array([[1] * 7 + [2] * 4 + [0] * 2])
    positions = np.array([[*range(7), *range(4), 0, 0]])
    packed = run_forward(cfg, variables, tokens, positions, segments)
    start = 0
    for length in lengths:
        # alone in a row of its own; what fills the row up comes later, and no token sees later ones
        row = np.pad(tokens[:, start : start + length], ((0, 0), (0, T - length)))
        alone = run_forward(cfg, variables, row)
        rows = slice(start, start + length)
        np.testing.assert_allclose(packed.logits[:, rows], alone.logits[:, :length], atol=1e-4)
        for k in (1, 2):
            inside = packed.mtp_logits[k - 1][:, start : start + length - k]
            np.testing.assert_allclose(inside, alone.mtp_logits[k - 1][:, : length - k], atol=1e-4)
        np.testing.assert_array_equal(packed.router.ids[:, rows], alone.router.ids[:, :length])
        start += length
    for layer in range(cfg.num_moe_layers):
        chosen = np.asarray(packed.router.ids[layer, :start]).ravel()
        np.testing.assert_array_equal(packed.router.load[layer], np.bincount(chosen, minlength=cfg.moe.num_experts))

    states = jax.jit(partial(hidden_states, cfg))(variables, tokens, positions, segments)
    np.testing.assert_array_equal(states.mtp_routing.load.sum(1), [cfg.moe.top_k * (11 - 2 * k) for k in (1, 2)])


def test_what_padding_holds_does_not_matter(config, variables_of, run_forward) -> None:
    cfg = config(mtp_depth=2)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 13))
    segments = np.array([[1] * 7 + [2] * 4 + [0] * 2])
    positions = np.array([[*range(7), *range(4), 0, 0]])
    other = tokens.copy()
    other[segments == 0] += 1
    other %= cfg.vocab_size
    first, second = (run_forward(cfg, variables, t, positions, segments) for t in (tokens, other))
    np.testing.assert_array_equal(first.logits[:, :11], second.logits[:, :11])
    np.testing.assert_array_equal(first.router.load, second.router.load)


def test_without_segments_documents_see_each_other(config, variables_of, run_forward) -> None:
    """Pre-training packs without masks: the second document then reads the first."""
    cfg = config(mtp_depth=2)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 13))
    positions = np.array([[*range(7), *range(6)]])
    masked = run_forward(cfg, variables, tokens, positions, np.array([[1] * 7 + [2] * 6]))
    unmasked = run_forward(cfg, variables, tokens, positions)
    np.testing.assert_allclose(unmasked.logits[:, :7], masked.logits[:, :7], atol=1e-4)
    assert np.abs(np.asarray(unmasked.logits - masked.logits))[:, 7:].max() > 0.1


def test_later_tokens_do_not_change_earlier_logits(config, variables_of, run_forward) -> None:
    cfg = config(mtp_depth=2)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 13))
    changed = tokens.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % cfg.vocab_size
    before, after = run_forward(cfg, variables, tokens), run_forward(cfg, variables, changed)
    np.testing.assert_array_equal(before.logits[:, :8], after.logits[:, :8])
    for k in (1, 2):
        np.testing.assert_array_equal(before.mtp_logits[k - 1][:, : 8 - k], after.mtp_logits[k - 1][:, : 8 - k])
        assert np.abs(np.asarray(before.mtp_logits[k - 1] - after.mtp_logits[k - 1]))[:, 8 - k].max() > 1e-3


@pytest.mark.parametrize("changes", [{"num_dense_layers": 0, "mtp_depth": 0}, {"num_dense_layers": 3, "mtp_depth": 0}])
def test_models_of_one_kind_of_layer(config, variables_of, run_forward, changes) -> None:
    cfg = config(**changes)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (2, 5))
    out = run_forward(cfg, variables, tokens)
    assert np.isfinite(out.logits).all()
    assert (out.router is None) == (cfg.num_moe_layers == 0)
    states = jax.eval_shape(partial(hidden_states, cfg), variables, tokens)
    assert states.mtp_routing is None
    assert states.routing is None or states.routing.balance_loss.shape == (cfg.num_moe_layers,)


def test_layers_run_in_order(config, variables_of, run_forward) -> None:
    """A stack of layers is a sequence: swapping two changes the result, and router rows follow the layers."""
    cfg = config(mtp_depth=0)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (2, 6))
    flipped = jax.tree.map(lambda leaf: leaf, variables)
    flipped["params"]["moe_layers"] = jax.tree.map(lambda leaf: leaf[::-1], variables["params"]["moe_layers"])
    flipped["router_state"] = jax.tree.map(lambda leaf: leaf[::-1], variables["router_state"])
    one, two = run_forward(cfg, variables, tokens), run_forward(cfg, flipped, tokens)
    assert np.abs(np.asarray(one.logits - two.logits)).max() > 0.1
    pinned = jax.tree.map(lambda leaf: leaf, variables)
    bias = np.zeros((2, cfg.moe.num_experts), np.float32)
    bias[1, :4] = 100.0
    pinned["router_state"] = {"moe_layers": {"moe": {"router": {"bias": jnp.asarray(bias)}}}}
    out = run_forward(cfg, pinned, tokens)
    assert (np.asarray(out.router.ids[1]) < 4).all()
    assert (np.asarray(out.router.ids[0]) >= 4).any()


def test_equations_can_be_replaced(config, variables_of, run_forward) -> None:
    """A router put in with `dataclasses.replace` reaches every MoE layer and module; so does an attention core."""
    cfg = config(mtp_depth=2)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 13))

    def my_route(logits, bias, **how):
        weights, ids = route(logits, bias, **how)
        return jnp.full_like(weights, 0.25), ids

    routed = dataclasses.replace(FLOAT32, route=my_route)
    out, plain = run_forward(cfg, variables, tokens, functions=routed), run_forward(cfg, variables, tokens)
    np.testing.assert_array_equal(out.router.weights, 0.25)
    assert np.abs(np.asarray(out.mtp_logits[1] - plain.mtp_logits[1])).max() > 1e-3
    same = run_forward(cfg, variables, tokens, functions=dataclasses.replace(FLOAT32, attend=attend_reference))
    np.testing.assert_allclose(same.logits, plain.logits, atol=1e-4)


@pytest.fixture(scope="module", params=[0, 1], ids=["main", "with_mtp"])
def backward(request, config, variables_of):
    """For each `remat`: the compiled gradient, and its value."""
    cfg = config(num_layers=6, mtp_depth=request.param)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (4, 32))

    def total(params, remat):
        states = hidden_states(cfg, {**variables, "params": params}, tokens, remat=remat)
        ahead = 0.0
        if states.mtp_hidden is not None:
            ahead = jnp.sin(states.mtp_hidden).sum() + states.mtp_routing.balance_loss.sum()
        return jnp.sin(states.hidden).sum() + ahead + states.routing.balance_loss.sum()

    compiled = {}
    for remat in ("none", "paper", "full"):
        step = jax.jit(jax.grad(partial(total, remat=remat))).lower(variables["params"]).compile()
        compiled[remat] = step, step(variables["params"])
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["paper", "full"])
def test_recomputing_changes_no_gradient(backward, remat: str) -> None:
    expected, actual = backward["none"][1], backward[remat][1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        ours = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        np.testing.assert_allclose(ours, leaf, atol=2e-4 * np.abs(leaf).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_recomputing_saves_memory(backward) -> None:
    """ "full" keeps less than "paper", which keeps well under what "none" keeps."""
    size = {name: step.memory_analysis().temp_size_in_bytes for name, (step, _) in backward.items()}
    assert size["full"] < size["paper"] < 0.75 * size["none"], size


def test_every_saved_name_names_a_tensor_and_every_named_tensor_is_saved(config, variables_of) -> None:
    cfg = config()
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 70))  # more tokens than decoding steps have

    def total(params):
        states = hidden_states(cfg, {**variables, "params": params}, tokens)
        return states.hidden.sum() + states.mtp_hidden.sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(variables["params"])
    sent_by_others = "experts_received"  # tests/planning/test_fit.py looks for it on a mesh
    assert set(re.findall(r"name\[name=(\w+)\]", str(jaxpr))) == {*PAPER} - {sent_by_others}


def test_offloading_moves_saved_tensors_to_the_host(config, variables_of) -> None:
    cfg = config(mtp_depth=0)
    variables, tokens = variables_of(cfg), tokens_of(cfg, (1, 8))

    def total(params):
        return hidden_states(cfg, {**variables, "params": params}, tokens, remat="offload").hidden.sum()

    traced = jax.jit(jax.grad(total)).trace(variables["params"])
    assert "pinned_host" in traced.lower(lowering_platforms=("cuda",)).as_text()  # a CPU has one memory


def test_left_padding_and_right_padding_agree(config, variables_of, run_forward) -> None:
    cfg = config(mtp_depth=2)
    variables, prompt = variables_of(cfg), tokens_of(cfg, (1, 9))
    real, positions = np.ones((1, 9), np.int32), np.arange(9)[None]
    left, right = (
        run_forward(cfg, variables, *(np.pad(row, ((0, 0), side)) for row in (prompt, positions, real)))
        for side in ((4, 0), (0, 4))
    )
    np.testing.assert_allclose(left.logits[:, 4:], right.logits[:, :9], atol=1e-4)
    np.testing.assert_array_equal(left.router.load, right.router.load)
