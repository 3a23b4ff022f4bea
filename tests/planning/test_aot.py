"""A step for a mesh holds what `fit` counts, class by class; the compiled one is read for what devices send."""

import types
from pathlib import Path

import jax
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.planning.aot import compile_on, main, report, trace_on
from dsv3_jax.planning.collectives import Collective, collectives, sent_bytes
from dsv3_jax.planning.held import GRADIENTS, MASTERS, MOMENTS, SAVED, USED, WAITING, held

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
BATCH = ["train.batch.micro=4", "train.batch.start=16", "train.batch.full=16", "train.seq_len=64"]
PIPELINE = [*BATCH, "parallel.pipe=2", "parallel.expert=2"]


MESH = types.SimpleNamespace(shape={"pipe": 2, "data": 2, "node": 1, "expert": 4, "tensor": 1})


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups=mesh['pipe'=2,'data'=2,'node'=1,'expert'=4,'tensor'=1] {'data','expert'}", ("data", "expert")),
        ("replica_groups=[4,4]<=[16]", ("expert",)),
        ("replica_groups=[8,2]<=[2,2,4]T(0,2,1)", ("data",)),
        ("replica_groups={{0,8},{1,9}}", ("pipe",)),
        ("source_target_pairs={{0,8},{8,0}}", ("pipe",)),
        ("replica_groups={}", ("pipe", "data", "expert")),
    ],
)
def test_axes_are_read_however_groups_are_written(written, axes):
    line = f"  %x = (f32[8]{{0}}, f32[8]{{0}}) all-to-all(%a, %b), channel_id=1, {written}, metadata={{}}"
    program = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    assert collectives(program, MESH) == [Collective("all-to-all", axes, "f32", 16, 1, 0, False)]


def test_loops_and_branches_are_entered():
    program = """%body (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} reduce-scatter(%p), replica_groups=[4,4]<=[16], to_apply=%sum
}
%deep (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
%c (p: f32[4]) -> pred[] {
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%a), condition=%c, body=%deep
  %i = f32[4]{0} conditional(%q, %a, %a), true_computation=%body, false_computation=%c
}
"""
    in_branch, in_loops = sorted(collectives(program, MESH), key=lambda one: one.runs)
    assert (in_loops.runs, in_loops.open_loops, in_loops.is_conditional) == (5, 1, False)
    assert (in_branch.runs, in_branch.open_loops, in_branch.is_conditional) == (1, 0, True)
    assert sent_bytes(in_loops, MESH.shape) == 3 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["precision=fp8_dsv3", "model.num_layers=4", "model.mtp_depth=2", "parallel.capacity=1.25"],
        ["precision=mixed", "model.num_layers=5", "model.num_dense_layers=2", "parallel.schedule=dualpipe"],
        ["parallel.schedule=one_f_one_b", "parallel.tensor=2", "train.remat=received", "model.mtp_depth=0"],
        ["parallel.data=1", "parallel.expert=4", "parallel.expert_nodes=2", "train.remat=full", "model.num_layers=4"],
    ],
)
def test_a_pipeline_holds_what_fit_counts(changes):
    cfg = load_config(TINY, [*PIPELINE, *changes])
    mesh = make_mesh(cfg.parallel)
    found, counted = trace_on(cfg, mesh).held, held(cfg, dict(mesh.shape))
    assert set(found) == {MASTERS, MOMENTS, USED, GRADIENTS, SAVED, WAITING}
    assert found == {name: counted.of(name) for name in found}


@pytest.mark.slow
def test_a_compiled_step_tells_what_devices_send():
    cfg = load_config(TINY, [*BATCH, "parallel.expert=2", "model.num_layers=2", "model.mtp_depth=0"])
    mesh = make_mesh(cfg.parallel, jax.devices()[:4])
    compiled = compile_on(cfg, mesh)
    assert compiled.complaints == []
    kinds = {(one.kind, one.axes) for one in compiled.exchanged}
    assert {("all-to-all", ("expert",)), ("all-gather", ("data", "expert"))} <= kinds
    text = report(cfg, mesh, compiled)
    assert f"| stored masters | {compiled.held[MASTERS]:,} | {compiled.held[MASTERS]:,} |" in text
    assert "No 'Involuntary full rematerialization'" in text


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--devices=0"], "--devices 0"), (["--devices=3"], "does not divide 3 devices")]
)
def test_errors_are_clear(arguments, said, capsys: pytest.CaptureFixture[str]):
    assert main([str(TINY), *arguments, "--set", "parallel.expert=2"]) == 2
    assert said in capsys.readouterr().err
