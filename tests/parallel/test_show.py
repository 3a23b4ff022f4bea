"""What `python -m dsv3_jax.parallel.pipeline.show` prints and writes."""

import json
import re
from pathlib import Path

import pytest

from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.schedule import chunks, dualpipe_v
from dsv3_jax.parallel.pipeline.show import main
from dsv3_jax.parallel.pipeline.simulate import Costs, simulate


def test_a_schedule_as_text_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, trace = tmp_path / "x.png", tmp_path / "x.json"
    command = ["dualpipe_v", "--stages", "8", "--micro-batches", "20", "--width", "60"]
    assert main([*command, "--png", str(png), "--trace", str(trace)]) == 0
    told = capsys.readouterr().out
    assert "dualpipe_v: 8 stages on 4 ranks, 20 micro-batches; F = 1, B = 2, W = 1, FB = 3" in told
    assert "makespan 126, of it idle (bubble) 6; by the report's formula at most 6" in told
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    orders = dualpipe_v(8, 20)
    simulated = simulate(orders, Costs(), Placement.v(4))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank, tasks in enumerate(orders):
        own = [event for event in events if event["tid"] == rank]
        assert [event["ts"] / 1000 for event in own] == simulated.start[rank]
        assert [(event["ts"] + event["dur"]) / 1000 for event in own] == simulated.end[rank]
        parts = [[(part["kind"], part["direction"], part["mb"]) for part in event["args"]["parts"]] for event in own]
        assert parts == [[tuple(chunk) for chunk in chunks(task)] for task in tasks]

    for rank, tasks in enumerate(orders):  # the blocks of the timeline, joined, hold every task at its time
        line = "".join(re.findall(rf"^rank {rank} (.*)$", told, re.MULTILINE))
        assert len(line) == 3 * 126
        for task, start in zip(tasks, simulated.start[rank], strict=True):
            first = f"{task[0][0].lower() if task[1] else task[0][0]}{task[2]}"
            assert line[round(3 * start) :].startswith(first)
        assert line.count(".") == 3 * simulated.bubble[rank]


def test_phases_costs_and_a_greedy_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--stages=2", "--micro-batches=3", "--phases", "--width=80"]
    assert main(["zero_bubble", *flags, "--costs", "F=2", "B=4", "W=1.5"]) == 0
    told = capsys.readouterr().out
    assert "makespan 21, of it idle (bubble) 3; by the report's formula at most 3" in told
    assert re.search(r"rank 1\n +1 x  F own, I own +weight gradients are put off", told)
    assert main(["dualpipe", "--stages=4", "--micro-batches=3", "--width=80"]) == 0
    assert "dualpipe (greedy: it does not allow 3 micro-batches): 4 stages on 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dualpipe_v --stages 7", "--stages 7 must be even for dualpipe_v, two on each rank; use 8."),
        ("dualpipe --stages 3", "num_ranks=3 must be even"),
        ("gpipe --stages 0", "--stages 0 must be at least 1"),
        ("gpipe --micro-batches 0", "num_microbatches=0 must be at least 1"),
        ("gpipe --costs X=1", "--costs X=1 is not a cost; write F, B, W or FB, = and a number, such as FB=2.5"),
        ("gpipe --costs F=nan", "--costs F=nan is not a cost"),
        ("gpipe --costs W=2", "W is a part of B"),
        ("gpipe --width 3", "--width 3 must be at least 20"),
        ("dualpipe_v --micro-batches 7 --phases", "a greedy schedule has none"),
        ("gpipe --stages 1 --micro-batches 1 --trace no/such/folder/x.json", "x.json cannot be written"),
        ("gpipe --stages 1 --micro-batches 1 --png no/such/folder/x.png", "x.png cannot be written"),
    ],
)
def test_user_errors_exit_with_2(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
