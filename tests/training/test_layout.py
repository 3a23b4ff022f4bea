"""Which layers the stages of a pipeline have."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.parallel.pipeline.schedule import placement_for
from dsv3_jax.training.layout import DENSE, IDLE, MOE, layout_of, spread
from tests.small import make_config


def test_the_last_stage_has_fewer_layers_for_its_head_and_mtp_modules():
    cfg = make_config(num_layers=9, mtp_depth=0, vocab_size=8)
    wide = dataclasses.replace(cfg, vocab_size=2000)
    assert spread(cfg, 3, seq_len=16) == [3, 3, 3]
    assert spread(dataclasses.replace(wide, num_layers=8), 3, seq_len=16) == [3, 3, 2]
    assert spread(dataclasses.replace(cfg, mtp_depth=1, num_layers=8), 3, seq_len=16) == [3, 3, 2]


def test_671b_needs_two_slots_a_stage_and_one_of_them_for_dense_layers():
    counts = spread(ModelConfig(), 32, seq_len=4096)
    layout = layout_of(ModelConfig(), placement_for("dualpipe_v", 16), seq_len=4096)
    assert sum(counts) == 61
    assert (layout.num_slots, layout.num_dense_slots) == (2, 1)


@pytest.mark.parametrize("name", ["dualpipe_v", "dualpipe", "one_f_one_b"])
def test_each_layer_has_one_slot_in_the_order_of_the_model(name):
    cfg = make_config(num_layers=10, num_dense_layers=2, mtp_depth=2)
    layout = layout_of(cfg, placement_for(name, 4), seq_len=16)
    is_busy = layout.kind[:-1] != IDLE
    np.testing.assert_array_equal(layout.layer[is_busy], np.arange(12))
    np.testing.assert_array_equal(layout.kind[:-1][is_busy], [DENSE] * 2 + [MOE] * 10)
    np.testing.assert_array_equal(layout.router[:-1][layout.kind[:-1] == MOE], np.arange(10))
    assert (layout.kind[-1] == IDLE).all()
    assert is_busy[-1, -2:].all()  # MTP modules come last


def test_more_stages_than_layers_are_an_error():
    with pytest.raises(ConfigError, match="8 stages of the pipeline are more than num_layers=5"):
        spread(make_config(num_layers=5), 8, seq_len=16)
