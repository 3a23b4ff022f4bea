"""Shapes of models that contradict themselves are refused where they are made."""

import dataclasses
import math

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig


def test_members_of_the_family_are_valid():
    assert YarnConfig(beta_fast=1.0, beta_slow=1.0).beta_fast == 1.0
    assert ModelConfig(bos_id=None).bos_id is None
    assert ModelConfig(num_layers=2, num_dense_layers=2).num_moe_layers == 0


@pytest.mark.parametrize("cls", [YarnConfig, MLAConfig, MoEConfig, ModelConfig])
def test_every_number_is_finite(cls):
    for field in dataclasses.fields(cls):
        wrong = {float: [math.nan, math.inf, -math.inf], int: [True, 10**400]}  # the tests' type checks refuse the rest
        kind = int if field.type == int | None else field.type
        for value in wrong.get(kind, []):
            with pytest.raises(ConfigError, match=rf"{field.name}.*\({cls.__name__}\.{field.name}\)"):
                cls(**{field.name: value})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: YarnConfig(beta_fast=1.0, beta_slow=2.0), r"beta_fast=1.0 must be at least beta_slow=2.0"),
        (lambda: YarnConfig(beta_slow=0.0), r"beta_slow=0.0, and that above 0"),
        (lambda: YarnConfig(mscale=-1.0), r"mscale=-1.0 is negative"),
        (lambda: MoEConfig(scale=0.0), r"scale=0.0 must be positive"),
        (lambda: ModelConfig(norm_eps=-1e-6), r"norm_eps=-1e-06 is negative"),
        (lambda: ModelConfig(rope_theta=1.0), r"rope_theta=1.0 must exceed 1"),
        (lambda: ModelConfig(bos_id=129280), r"bos_id=129280 is outside vocab_size=129280"),
        (lambda: ModelConfig(eos_id=-1), r"eos_id=-1 is outside"),
    ],
)
def test_contradictions_are_refused(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()
