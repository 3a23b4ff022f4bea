import dataclasses

import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.planning.flops import forward_flops_by_part, train_flops_per_token
from dsv3_jax.planning.params import report
from tests.small import make_config


def test_without_context_it_is_twice_the_activated_matrices():
    """At a context of one token a forward pass costs two operations a weight that works on it."""
    cfg = dataclasses.replace(ModelConfig(), mtp_depth=0)
    parts = forward_flops_by_part(cfg, seq_len=1)
    matrices = sum(parts.values()) - parts["attention"]
    assert matrices / 2 == pytest.approx(report(cfg).activated_without_embedding, rel=1e-3)


def test_attention_grows_with_context_and_mtp_adds_a_layer_and_a_head():
    cfg = ModelConfig()
    short, long = forward_flops_by_part(cfg, 4096), forward_flops_by_part(cfg, 8192)
    assert long["attention"] == pytest.approx(2 * short["attention"], rel=1e-3)
    assert short["mtp"] > short["head"] + short["experts"] / cfg.num_moe_layers
    assert train_flops_per_token(cfg, 4096) == 3 * sum(short.values())


def test_a_token_attends_to_those_before_it_only():
    """Counted pair by pair: query t reads keys 0 to t, a multiply-add a dimension of the keys, then of the values."""
    cfg, T = make_config(mtp_depth=0), 7
    pairs = sum(1 for t in range(T) for s in range(T) if s <= t)
    products = 2 * cfg.mla.num_heads * (cfg.mla.qk_head_dim + cfg.mla.v_head_dim)
    assert forward_flops_by_part(cfg, T)["attention"] * T == cfg.num_layers * pairs * products
