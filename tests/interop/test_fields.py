"""Any model that is written reads back the same; of any file that is read only user errors come out."""

import json
from collections.abc import Callable
from typing import Literal

import hypothesis
import hypothesis.strategies as st

from dsv3_jax.config.check import ConfigError, UserError
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.interop.hf_config import fp8_block, from_hf, to_hf

SIZES = st.integers(1, 2**40)
POSITIVE = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)
MSCALES = st.sampled_from([0.0, 0.5, 0.707, 1.0]) | st.floats(0.0, 1e6)


@st.composite
def yarns(draw: st.DrawFn) -> YarnConfig:
    beta_slow, beta_fast = sorted([draw(POSITIVE), draw(POSITIVE)])
    return YarnConfig(
        factor=draw(st.floats(1.0, allow_infinity=False)),
        original_max_position=draw(SIZES),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=draw(MSCALES),
        mscale_all_dim=draw(MSCALES),
    )


@st.composite
def moes(draw: st.DrawFn) -> MoEConfig:
    kinds: list[tuple[Literal["sigmoid", "softmax"], bool]] = [("sigmoid", True), ("softmax", False), ("softmax", True)]
    score, has_bias = draw(st.sampled_from(kinds))
    num_groups = draw(st.integers(1, 9))
    group_size = draw(st.integers(2 if has_bias and num_groups > 1 else 1, 99))
    groups_per_token = draw(st.integers(1, num_groups))
    return MoEConfig(
        num_experts=num_groups * group_size,
        num_shared_experts=draw(st.integers(0, 9)),
        top_k=draw(st.integers(1, groups_per_token * group_size)),
        expert_dim=draw(SIZES),
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        score=score,
        normalize_weights=draw(st.booleans()),
        has_bias=has_bias,
        scale=draw(st.just(1.0) | POSITIVE),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    vocab_size, num_layers = draw(st.integers(1, 2**30)), draw(st.integers(1, 99))
    ids = st.integers(0, vocab_size - 1)
    return ModelConfig(
        vocab_size=vocab_size,
        model_dim=draw(SIZES),
        num_layers=num_layers,
        num_dense_layers=draw(st.integers(0, num_layers)),
        ffn_dim=draw(SIZES),
        mla=MLAConfig(
            num_heads=draw(SIZES),
            q_latent_dim=draw(st.none() | SIZES),
            kv_latent_dim=draw(SIZES),
            nope_head_dim=draw(SIZES),
            rope_head_dim=2 * draw(SIZES),
            v_head_dim=draw(SIZES),
        ),
        moe=draw(moes()),
        mtp_depth=draw(st.integers(0, 3)),
        max_position=draw(SIZES),
        rope_theta=draw(st.floats(1.0, exclude_min=True, allow_infinity=False)),
        yarn=draw(st.none() | yarns()),
        norm_eps=draw(st.floats(0.0, allow_infinity=False)),
        latent_norm_eps=draw(st.sampled_from([1e-6, 1e-6, 1e-5])),
        init_std=draw(POSITIVE),
        bos_id=draw(st.none() | ids),
        eos_id=draw(st.none() | ids),
    )


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(cfg=models(), dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]))
def test_every_model_that_is_written_reads_back_the_same(cfg, dtype):
    try:
        written = json.loads(json.dumps(to_hf(cfg, dtype), allow_nan=False))
    except ConfigError:
        assert cfg.latent_norm_eps != 1e-6 or cfg.moe.score == "softmax" or cfg.yarn is not None
        return
    assert from_hf(written) == cfg
    assert (fp8_block(written) == (128, 128)) == (dtype == "float8_e4m3fn")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


V3 = to_hf(ModelConfig(), "float8_e4m3fn")
V2 = to_hf(ModelConfig(mtp_depth=0, moe=MoEConfig(score="softmax", has_bias=False, scale=1.0)), "bfloat16")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([400, 5000]).map(lambda digits: -(10**digits))
    | st.sampled_from([1e308, "yarn", "default", "true"])
    | st.just(3000).map(nested),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
OTHER_KEYS = [
    *("model_type", "mlp_bias", "rope_interleave", "rope_parameters", "num_experts", "head_dim", "qk_head_dim"),
    *("original_max_position_embeddings", "partial_rotary_factor", "unheard_of"),
]
ROPE_KEYS = [*V3["rope_scaling"], "rope_type", "rope_theta", "attention_factor", "truncate", "unheard_of"]
ABSENT = object()
CHANGES = st.tuples(
    st.tuples(st.sampled_from([*V3, *OTHER_KEYS]))
    | st.tuples(st.sampled_from(["rope_scaling", "rope_parameters"]), st.sampled_from(ROPE_KEYS))
    | st.tuples(st.just("quantization_config"), st.sampled_from([*V3["quantization_config"], "unheard_of"])),
    st.just(ABSENT) | JSON,
)


def changed(config: dict, path: tuple[str, ...], value: object) -> dict:
    key, *rest = path
    if rest:
        inside = config.get(key)
        value = changed(inside if isinstance(inside, dict) else {}, tuple(rest), value)
    return {name: config[name] for name in config if name != key} | ({} if value is ABSENT else {key: value})


def read_and_write(config: dict) -> None:
    cfg = from_hf(config)
    assert from_hf(to_hf(cfg, "bfloat16")) == cfg


def refusal(read: Callable[[dict], object], config: dict) -> str:
    try:
        read(config)
    except UserError as error:
        return str(error)
    return ""


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(base=st.sampled_from([V3, V2]), changes=st.lists(CHANGES, min_size=1, max_size=4))
def test_only_user_errors_leave_the_reader(base, changes):
    for path, value in changes:
        base = changed(base, path, value)
    assert all(len(refusal(read, base)) < 1000 for read in (read_and_write, fp8_block))
