"""Steps of any size fit into few shapes."""

import dataclasses

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig
from dsv3_jax.serving.shapes import shapes_of
from tests.small import BASE

LONG = dataclasses.replace(BASE, max_position=2048)
SERVING = [
    ServingConfig(),
    ServingConfig(max_num_seqs=1),
    ServingConfig(max_num_seqs=24, max_num_batched_tokens=100),
    ServingConfig(max_num_seqs=3, max_num_batched_tokens=3, num_pages=2),
    ServingConfig(max_num_seqs=256),
    ServingConfig(max_num_seqs=5, batch_invariant=True),
]


@pytest.mark.parametrize("cfg", [BASE, LONG, ModelConfig()], ids=["one page", "small", "V3"])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("serving", SERVING, ids=range(len(SERVING)))
def test_whatever_a_step_may_hold_fits(cfg: ModelConfig, serving: ServingConfig, on_cpu: bool) -> None:
    shapes = shapes_of(cfg, serving, on_cpu=on_cpu)
    assert max(shapes.rows) >= serving.max_num_seqs
    for count in range(1, max(shapes.rows) + 1):
        assert count <= shapes.rows_for(count) < 2 * count or serving.batch_invariant
    longest = min(cfg.max_position, shapes.num_pages * PAGE_SIZE)
    for count in {1, 2, 15, 33, shapes.max_num_batched_tokens // 2, shapes.max_num_batched_tokens}:
        if 0 < count <= min(shapes.max_num_batched_tokens, longest):
            for start in {0, (longest - count) // 3, longest - count}:
                tokens, pages = shapes.chunk_for(start, count)
                assert tokens >= count
                assert start + count <= pages * PAGE_SIZE


def test_shapes_are_few_by_default() -> None:
    for cfg in (BASE, LONG, ModelConfig()):
        for on_cpu in (True, False):
            shapes = shapes_of(cfg, ServingConfig(), on_cpu=on_cpu)
            assert len(shapes.rows) + len(shapes.chunk_batches) + len(shapes.drawn) <= 16


def test_defaults_follow_model_and_device() -> None:
    assert shapes_of(LONG, ServingConfig(), on_cpu=True).max_num_batched_tokens == 128
    assert shapes_of(LONG, ServingConfig(), on_cpu=False).max_num_batched_tokens == 2048
    assert shapes_of(LONG, ServingConfig(), on_cpu=True).num_pages == 16 * 32
    assert shapes_of(BASE, ServingConfig(), on_cpu=True).num_pages == 16
    assert shapes_of(ModelConfig(), ServingConfig(max_num_seqs=2), on_cpu=True).num_pages == 2 * 32


def test_batch_invariance_leaves_one_shape_of_each_kind() -> None:
    shapes = shapes_of(ModelConfig(), ServingConfig(batch_invariant=True), on_cpu=False)
    assert shapes.rows == (16,)
    assert len(shapes.chunk_batches) == 1


def test_a_budget_below_the_running_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8"):
        shapes_of(LONG, ServingConfig(max_num_seqs=16, max_num_batched_tokens=8), on_cpu=True)
