"""The hostile run: a live server passes it, and its judge finds what is wrong."""

import asyncio
import json
import random

import pytest

from dsv3_jax.bench import hostile
from dsv3_jax.bench.hostile_acts import ACTS, Known, Stage, Tally, act
from dsv3_jax.bench.hostile_server import growth
from dsv3_jax.bench.http_client import Server
from dsv3_jax.bench.load_client import Target


def stage() -> Stage:
    return Stage(Target(Server("127.0.0.1", 1), "m"), [Known((1,), {}, (5, 6))], 64, Tally())


def test_the_judge_finds_faults():
    judge = stage()
    error = json.dumps({"error": {"message": "", "type": "", "param": None, "code": None}}).encode()
    assert judge.judge("good", 200, b"", (200, 429))
    assert not judge.judge("refused", 429, error, (200, 429))
    judge.compare("right", judge.known[0], [5, 6])
    assert not judge.tally.faults
    judge.judge("failed", 500, error, (200, 429))
    judge.judge("consented", 200, b"{}", (400, 404))
    judge.judge("shapeless", 400, b'{"detail": "x"}', (400,))
    judge.compare("wrong", judge.known[0], [5, 7])
    judge.compare("short", judge.known[0], [5])
    kinds = [fault.split(":")[0] for fault in judge.tally.faults]
    assert kinds == ["failed", "consented", "shapeless", "wrong", "short"]
    assert judge.tally.compared == 3


def test_no_answer_is_a_fault_whatever_the_act():
    judge = stage()
    for seed in range(60):
        asyncio.run(act(judge, random.Random(seed)))
    assert set(judge.tally.acts) == {act.__name__ for act, _ in ACTS}
    unheard = judge.tally.acts["leave_an_answer"] + judge.tally.acts["send_too_much"]
    assert sum(judge.tally.acts.values()) >= len(judge.tally.faults) >= 60 - unheard


def test_growth_leaves_out_what_came_before_memory_settled():
    seen = [10, 50, 90, *[100] * 17]
    assert growth(seen, settled=0.5) == 0
    assert growth([*seen[:-1], 106], settled=0.5) == pytest.approx(0.06)


CLOCKED = ("99th percentile of /health", "left after 1 s")
"""What a busy machine may miss."""


@pytest.mark.slow
def test_a_live_server_passes(capsys: pytest.CaptureFixture[str]):
    hostile.main(["--minutes", "0.5", "--clients", "16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not found["faults"]
    unmet = [line for line in found["lines"] if line["is_met"] is False]
    assert not [line for line in unmet if not any(part in line["what"] for part in CLOCKED)]
    assert found["acts"].keys() == {act.__name__ for act, _ in ACTS}
