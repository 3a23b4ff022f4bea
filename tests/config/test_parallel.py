"""A mesh that does not fit a run is refused by the configuration, before there is any device."""

import re
from pathlib import Path

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config, override, to_dict
from dsv3_jax.config.mesh_rules import check_rows, check_streams, num_stages, schedule_note
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.stored import complete
from dsv3_jax.config.train import BatchConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = load_config(CONFIGS / "tiny.py")
LARGE = load_config(CONFIGS / "dsv3_671b.py")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("expert=3", "model.moe.num_experts=16 is not divisible by parallel.expert=3; expert may be 1, 2, 4, 8 or 16."),
        ("expert=6 expert_nodes=2", "not divisible by parallel.expert=6; expert may be 2, 4, 8 or 16."),
        ("expert=4 expert_nodes=3", "peers cannot be shared by expert_nodes=3 nodes; expert_nodes may be 1, 2 or 4"),
        ("expert=0", "expert=0 must be at least 1"),
        ("data=0", "data=0 must be at least 1, or -1 for what is left"),
        ("data=-2", "data=-2 must be at least 1, or -1"),
        ("tensor=3", "model.mla.num_heads=4 is not divisible by parallel.tensor=3; tensor may be 1, 2 or 4."),
        ("tensor=8", "model.mla.num_heads=4 is not divisible by parallel.tensor=8; tensor may be 1, 2 or 4."),
        ("data=3", "micro=8 sequences cannot be shared by data 3 x expert 1 = 3 devices; data x expert may be 1, 2, 4"),
        ("data=4 expert=4", "train.batch.micro=8 sequences cannot be shared by data 4 x expert 4 = 16 devices"),
        ("expert=16", "train.batch.micro=8 sequences cannot be shared by data 1 x expert 16 = 16 devices"),
        ("pipe=3", "pipe=3 with schedule='dualpipe_v' has 6 stages, but the model has 4 blocks to give them"),
        ("pipe=3", "(layers, and MTP as one); pipe may be 1 to 2."),
        ("pipe=5 schedule=one_f_one_b", "has 5 stages, but the model has 4 blocks"),
        ("pipe=3 schedule=dualpipe", "schedule='dualpipe' joins ranks from both ends in pairs, but pipe=3 is odd"),
        ("pipe=3 schedule=dualpipe", "use pipe=2 or 4, or schedule='dualpipe_v'"),
        ("schedule=interleaved", "schedule=interleaved: not one of dualpipe_v, dualpipe, one_f_one_b."),
        ("gather=never", "gather=never: not one of step, layer."),
        ("overflow=keep", "overflow=keep: not one of rounds, drop."),
        ("capacity=0", "capacity=0.0 must be positive, or none for room for all (ParallelConfig.capacity)."),
        ("capacity=-1", "capacity=-1.0 must be positive"),
        ("capacity=nan", "capacity=nan is not finite"),
        (
            "sequence=2",
            "'parallel.sequence': context parallelism is not built: no axis splits a sequence; the axes are",
        ),
        ("experts=2", "unknown key; did you mean 'parallel.expert'?"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_does(settings: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(TINY, [f"parallel.{one}" for one in settings.split()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model.ffn_dim=450 parallel.tensor=4",
            "model.ffn_dim=450 is not divisible by parallel.tensor=4; tensor may be 1",
        ),
        ("model.moe.expert_dim=97 parallel.tensor=2", "model.moe.expert_dim=97 is not divisible by parallel.tensor=2"),
        (
            "precision=fp8_dsv3 parallel.tensor=2",
            "model.mla.num_heads x qk_head_dim=192 over parallel.tensor=2 leaves 96 on each device, which is no "
            "multiple of 128, the tile of precision='fp8_dsv3'; tensor may be 1.",
        ),
        (
            "train.remat=none parallel.pipe=2",
            "train.remat='none' with parallel.pipe=2 would save weights as they are cast, once for each micro-batch "
            "under way; use train.remat='paper', 'received' or 'full'.",
        ),
        ("train.remat=offload parallel.pipe=2", "would put on the host what lies in one pool of the device; use"),
        ("parallel.gather=layer parallel.pipe=2", "gather='layer' with parallel.pipe=2: ranks of a pipeline have the"),
    ],
)
def test_a_mesh_that_contradicts_another_setting_is_refused(settings: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(TINY, settings.split())


@pytest.mark.parametrize(
    "settings",
    [
        "pipe=2 expert=2",
        "pipe=4 schedule=dualpipe",
        "expert=8 expert_nodes=2 tensor=4 capacity=1.25 overflow=drop",
        "data=4 expert=2 gather=layer",
    ],
)
def test_a_mesh_that_fits_is_taken(settings: str):
    override(TINY, [f"parallel.{one}" for one in settings.split()])


def test_fp8_splits_the_released_model_into_whole_tiles():
    whole = ["precision=fp8_dsv3", "parallel.pipe=16", "parallel.expert=64", "parallel.data=2"]
    assert override(LARGE, [*whole, "parallel.tensor=16"]).parallel.tensor == 16
    message = r"parallel\.tensor=32 leaves 576 on each device, .* of 128, .* tensor may be 1, 2, 4, 8 or 16\."
    with pytest.raises(ConfigError, match=message):
        override(LARGE, [*whole, "parallel.tensor=32"])


def test_a_refused_micro_batch_is_told_those_that_fit():
    batch = BatchConfig(start=24, full=48, ramp_tokens=0, micro=8)
    with pytest.raises(ConfigError, match="micro may be 6, 12 or 24, or data x expert may be 1, 2, 4 or 8"):
        check_rows(batch, data=3, expert=2)
    check_rows(batch, data=4, expert=2)


def test_streams_are_shared_by_the_processes():
    check_streams(64, 4)
    with pytest.raises(
        ConfigError, match=r"data.streams=64 cannot be shared by 6 processes .* may be 1, 2, 4, 8, 16 or 32 "
    ):
        check_streams(64, 6)


def test_a_number_of_micro_batches_that_a_schedule_does_not_take_is_told_not_refused():
    def note(batch: BatchConfig, **axes) -> str:
        return schedule_note(ParallelConfig(**axes), batch) or ""

    ramp, odd = BatchConfig(start=8, full=64, ramp_tokens=0, micro=4), BatchConfig(start=9, full=9, micro=1)
    assert note(ramp) == note(ramp, pipe=2, schedule="one_f_one_b") == note(ramp, pipe=1) == note(odd, pipe=4) == ""
    told = "dualpipe_v takes at least 2 x pipe = 4 micro-batches a step; steps of others, from 2, run in the order of"
    assert told in note(ramp, pipe=2)
    assert "dualpipe takes at least 2 x pipe = 8, an even number, micro-batches a step" in note(
        odd, pipe=4, schedule="dualpipe"
    )


def test_stages_are_two_a_rank_for_dualpipe_v_alone():
    stages = [num_stages(ParallelConfig(pipe=2, schedule=name)) for name in ("dualpipe_v", "dualpipe", "one_f_one_b")]
    assert [*stages, num_stages(ParallelConfig())] == [4, 2, 2, 1]


def test_a_run_stored_before_there_were_meshes_is_one_of_the_defaults():
    tree = to_dict(TINY)
    assert tree.pop("parallel")["data"] == -1
    assert complete(tree, where="x") == to_dict(TINY)
    assert RunConfig(TINY.name, TINY.model, TINY.data, TINY.train) == TINY
