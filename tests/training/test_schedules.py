import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig
from dsv3_jax.training.schedules import bias_speed, learning_rate, mtp_weight, num_micro_batches

RATE = LearningRateConfig()
BATCH = BatchConfig()
TRILLION = 10**12


def test_the_reports_five_phases():
    assert learning_rate(0, RATE) == 0.0
    assert learning_rate(RATE.warmup_tokens // 2, RATE) == pytest.approx(1.1e-4)
    assert learning_rate(RATE.warmup_tokens, RATE) == 2.2e-4
    assert learning_rate(10 * TRILLION, RATE) == 2.2e-4
    assert learning_rate(12 * TRILLION + 150 * 10**9, RATE) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert learning_rate(14_300 * 10**9, RATE) == 2.2e-5
    assert learning_rate(14_633 * 10**9, RATE) == 2.2e-5
    assert learning_rate(14_633 * 10**9 + 1, RATE) == 7.3e-6
    assert learning_rate(14_800 * 10**9, RATE) == 7.3e-6


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_rate_falls_along_a_cosine(share: float):
    tokens = RATE.constant_until_tokens + int(share * RATE.cosine_tokens)
    expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * share)) / 2
    assert learning_rate(tokens, RATE) == pytest.approx(expected, rel=1e-9)


@given(st.integers(min_value=RATE.warmup_tokens, max_value=15 * TRILLION), st.integers(min_value=1, max_value=TRILLION))
def test_the_rate_never_rises_after_warm_up(tokens: int, more: int):
    assert learning_rate(tokens + more, RATE) <= learning_rate(tokens, RATE)


def test_the_ramp_has_the_reports_ends_and_is_linear_between():
    one = BatchConfig(micro=1)
    assert num_micro_batches(0, one) == 3072
    assert num_micro_batches(469 * 10**9, one) == 15360
    assert num_micro_batches(14 * TRILLION, one) == 15360
    assert num_micro_batches(469 * 10**9 // 2, one) == (3072 + 15360) // 2
    assert num_micro_batches(0, BATCH) == 24
    assert num_micro_batches(469 * 10**9, BATCH) == 120
    assert num_micro_batches(469 * 10**9 * 7 // 24, BatchConfig(micro=3072)) == 2, "2.17 of them"
    assert num_micro_batches(469 * 10**9 * 9 // 24, BatchConfig(micro=3072)) == 3, "2.5 of them"


@given(st.integers(min_value=0, max_value=TRILLION), st.integers(min_value=0, max_value=TRILLION))
def test_the_batch_never_shrinks(tokens: int, more: int):
    assert num_micro_batches(tokens + more, BATCH) >= num_micro_batches(tokens, BATCH)


def test_warm_up_is_two_thousand_steps_of_the_ramp(repository: Path):
    """With the configuration's own micro-batch; the whole ramp takes as many steps as the line does, 14 998."""
    train = load_config(repository / "configs" / "dsv3_671b.py").train
    assert (train.lr, train.batch) == (RATE, BATCH)
    tokens, steps = 0, 0
    while tokens < train.batch.ramp_tokens:
        tokens += num_micro_batches(tokens, train.batch) * train.batch.micro * train.seq_len
        steps += 1
        if steps == 2000:
            assert math.isclose(tokens, train.lr.warmup_tokens, rel_tol=2e-3)
    assert math.isclose(steps, 14_998, rel_tol=1e-3)


def test_mtp_weight_and_bias_speed_switch_where_the_report_says():
    auxiliary = AuxiliaryConfig()
    assert mtp_weight(10 * TRILLION, auxiliary) == 0.3
    assert mtp_weight(10 * TRILLION + 1, auxiliary) == 0.1
    assert bias_speed(14_300 * 10**9, auxiliary) == 0.001
    assert bias_speed(14_300 * 10**9 + 1, auxiliary) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: LearningRateConfig(warmup_tokens=11 * TRILLION),
        lambda: LearningRateConfig(low=1.0),
        lambda: BatchConfig(start=15360, full=3072),
        lambda: BatchConfig(micro=1000),
        lambda: AuxiliaryConfig(bias_speed=-1.0),
    ],
)
def test_contradictions_are_refused(make):
    with pytest.raises(ConfigError):
        make()
