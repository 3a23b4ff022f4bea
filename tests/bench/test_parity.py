"""A mesh learns what one device does: the parity check, on a few of its meshes and on drawn ones."""

import math
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from dsv3_jax.bench.parity import Difference, difference, main
from dsv3_jax.bench.parity_meshes import CASES, configure
from dsv3_jax.config.check import ConfigError

pytestmark = pytest.mark.usefixtures("compile_quickly")

PLAIN = ("model.mtp_depth=0", "train.batch.start=16", "train.batch.full=16", "train.batch.micro=16")


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=2,expert=2,tensor=2", ("train.remat=paper",)),
        ("data=2,expert=4,expert_nodes=2,gather=layer", ("train.batch.micro=8",)),
    ],
)
def test_a_mesh_learns_what_one_device_does(mesh, settings):
    found = difference(configure(mesh, [*PLAIN, *settings]), num_states=2)
    assert found.is_small, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("expert=4,expert_nodes=2,capacity=0.5", ("train.remat=paper", "data.document_mask=true", "model.mtp_depth=2")),
        ("data=2,expert=4", ("precision=fp8_dsv3",)),
    ],
)
def test_further_meshes_learn_what_one_device_does(mesh, settings):
    found = difference(configure(mesh, settings), num_states=5)
    assert found.is_small, found


@st.composite
def drawn_meshes(draw: Any) -> Any:
    """A mesh of at most eight devices, and what one device does not know of."""
    sizes = {axis: draw(st.sampled_from((1, 2, 4))) for axis in ("data", "expert", "tensor")}
    hypothesis.assume(1 < math.prod(sizes.values()) <= 8)
    sizes["expert_nodes"] = draw(st.sampled_from([n for n in (1, 2, 4) if sizes["expert"] % n == 0]))
    parts = [f"{axis}={size}" for axis, size in sizes.items()]
    parts += [
        f"gather={draw(st.sampled_from(('step', 'layer')))}",
        f"capacity={draw(st.sampled_from(('none', 0.4, 1)))}",
    ]
    settings = [f"train.remat={draw(st.sampled_from(('none', 'paper', 'full')))}"]
    return ",".join(parts), [*settings, f"train.batch.micro={draw(st.sampled_from((8, 16)))}"]


@pytest.mark.slow
@hypothesis.given(drawn_meshes())
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
def test_drawn_meshes_learn_what_one_device_does(drawn):
    mesh, settings = drawn
    found = difference(configure(mesh, [*PLAIN, *settings]), num_states=2)
    assert found.is_small, (drawn, found)


def test_all_cases_are_meshes_of_two_to_sixteen_devices_and_vary_everything():
    runs = [configure(case.mesh, case.settings) for case in CASES]
    assert len(runs) >= 20
    sizes = [run.parallel.pipe * run.parallel.data * run.parallel.expert * run.parallel.tensor for run in runs]
    assert (min(sizes), max(sizes)) == (2, 16)
    assert {run.model.mtp_depth for run in runs} == {0, 1, 2}
    assert {run.train.remat for run in runs} == {"none", "paper", "full"}
    assert {run.parallel.gather for run in runs} == {"step", "layer"}
    pipelines = {(run.parallel.schedule, run.parallel.pipe) for run in runs if run.parallel.pipe > 1}
    assert pipelines == {(name, size) for name in ("dualpipe_v", "dualpipe") for size in (2, 4)} | {("one_f_one_b", 4)}


def test_what_is_not_a_number_is_not_small():
    limits = (1.0, 1.0, 1.0)
    assert Difference(0.5, 1.0, 0.0, True, limits).is_small
    assert not Difference(0.5, math.nan, 0.0, True, limits).is_small
    assert not Difference(0.0, 0.0, 0.0, False, limits).is_small


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh", "data"], "'data' is not of the form axis=size"),
        (["--mesh", "experts=2"], "did you mean 'parallel.expert'"),
        (["--mesh", "expert=3"], "num_experts=8 is not divisible by parallel.expert=3"),
        (["--mesh", "expert=2,overflow=drop"], "use rounds"),
        (["--mesh", "data=2", "--states", "0"], "--states 0 must be at least 1"),
    ],
)
def test_user_errors_are_told(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_pipelines_are_configured_with_remat():
    with pytest.raises(ConfigError, match="remat"):
        configure("pipe=2", ["train.remat=none"])
