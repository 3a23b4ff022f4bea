"""The reader of the rotary embedding: two dialects, what they may both say, and what they may not."""

import dataclasses
import math

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import ModelConfig, YarnConfig
from dsv3_jax.interop.hf_config import from_hf, to_hf

RELEASED = to_hf(ModelConfig(), "bfloat16")
ROPE = RELEASED["rope_scaling"]
YARN5 = ROPE | {"rope_type": "yarn", "rope_theta": 10000}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": ROPE | {"original_max_position_embeddings": 4096.0}}, {}),
        ({"rope_scaling": ROPE | {"attention_factor": 1.0, "truncate": True}}, {}),
        ({"rope_parameters": ROPE | {"rope_theta": 1e4, "rope_type": "yarn"}}, {}),
        ({"rope_parameters": {}, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1}, {}),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"type": "default", "factor": None}},
         {"yarn": None}),
        ({"rope_scaling": ROPE | {"mscale": 0.5, "mscale_all_dim": None, "factor": 1}},
         {"yarn": YarnConfig(factor=1.0, mscale=0.5, mscale_all_dim=0.0)}),  # at factor 1 every magnitude is 1
    ],
)  # fmt: skip
def test_reads_what_transformers_reads(change, expected):
    assert from_hf(RELEASED | change) == dataclasses.replace(ModelConfig(), **expected)


def test_yarn_without_mscale_is_what_the_released_code_assumes():
    scaling = without(RELEASED["rope_scaling"], "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    assert from_hf(RELEASED | {"rope_scaling": scaling}).yarn == YarnConfig(mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_scaling": ROPE | {"beta_fast": math.nan}}, r"rope_scaling.beta_fast=nan must be a number"),
        ({"rope_scaling": ROPE | {"beta_fast": 0.5}}, r"beta_fast=0.5 must be at least beta_slow=1.0"),
        ({"rope_scaling": ROPE | {"truncate": 1}}, r"rope_scaling.truncate=1 must be true or false"),
        ({"rope_scaling": ROPE | {"beta": 32}}, r"rope_scaling has the key 'beta'.*known are rope_type"),
        ({"rope_scaling": without(ROPE, "type")}, r"key 'factor', which has no meaning for rope type 'default'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 cannot be represented"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"'linear'.*'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"'llama3'"),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn' is not an object"),
        ({"rope_scaling": ROPE | {"attention_factor": 2.0}}, r"attention_factor=2.0"),
        ({"rope_scaling": ROPE | {"truncate": False}}, r"truncate=False"),
        ({"rope_scaling": ROPE | {"mscale": 0.7, "mscale_all_dim": 0}}, r"mscale=0.7 without mscale_all_dim"),
        ({"rope_scaling": without(ROPE, "factor")}, r"'rope_scaling.factor' is missing"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    with pytest.raises(ConfigError, match=reason):
        from_hf(RELEASED | change)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, ("rope_scaling", "rope_parameters")),
        ({"rope_parameters": YARN5 | {"factor": 4}}, ("rope_scaling", "rope_parameters")),
        ({"rope_parameters": YARN5, "rope_scaling": {"type": "default"}}, ("rope_scaling", "rope_parameters")),
        ({"rope_parameters": YARN5 | {"rope_theta": 5e4}}, ("rope_theta", "rope_parameters.rope_theta")),
        ({"rope_scaling": YARN5, "rope_theta": 5e4}, ("rope_theta", "rope_scaling.rope_theta")),
        ({"rope_scaling": ROPE | {"rope_type": "default"}}, ("rope_scaling.rope_type", "rope_scaling.type")),
        ({"original_max_position_embeddings": 8192}, ("original_max_position_embeddings", "rope_scaling.original_max")),
        ({"rope_scaling": without(ROPE, "mscale") | {"mscale_all_dim": 0.707}}, ("mscale_all_dim", "mscale,")),
        ({"rope_scaling": without(ROPE, "mscale_all_dim") | {"mscale": 0.707}}, ("mscale", "mscale_all_dim,")),
        ({"rope_scaling": ROPE | {"mscale": 0}}, ("mscale_all_dim", "mscale,")),
        ({"rope_scaling": ROPE | {"attention_factor": 1.36}}, ("attention_factor", "mscale")),
    ],
)
def test_names_two_keys_that_contradict_each_other(change, keys):
    with pytest.raises(ConfigError) as caught:
        from_hf(RELEASED | change)
    assert all(key in str(caught.value) for key in keys)
