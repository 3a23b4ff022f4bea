"""Schedules of pipelines against DeepSeek's own task lists, and what their simulation says of them."""

import collections
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config.check import ConfigError
from dsv3_jax.parallel.pipeline import schedule
from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.schedule import Orders, Task, chunks, greedy, joined, phases, planned
from dsv3_jax.parallel.pipeline.simulate import Costs, DeadlockError, bubble_bound, simulate, ticks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dualpipe_orders.json").read_text())["cases"]
COSTS = {
    "F1_B2_W1_FB3": Costs(),
    "F1_B2_W1_FB2.5": Costs(FB=2.5),
    "F1_B2_W1_FB2": Costs(FB=2.0),
    "F2_B4_W1.5_FB5": Costs(F=2.0, B=4.0, W=1.5, FB=5.0),
}
LINEAR = ("one_f_one_b", "zero_bubble", "gpipe")


def made(case: dict[str, Any]) -> tuple[str, Placement, Orders]:
    """Name, placement and task lists for a case of the golden file."""
    if case["kind"] == "dualpipe":
        return "dualpipe", Placement.bidirectional(case["P"]), schedule.dualpipe(case["stages"], case["M"])
    return "dualpipe_v", Placement.v(case["P"]), schedule.dualpipe_v(case["stages"], case["M"])


def tasks_of(text: str) -> list[Task]:
    """The tasks of one rank from the golden file, where they stand as F0.1 and F0.1&B1.0."""
    tasks: list[Task] = []
    for word in text.split():
        found = re.fullmatch(r"([FBIW])(\d)\.(\d+)(?:&B(\d)\.(\d+))?", word)
        assert found
        first = int(found[2]), int(found[3])
        tasks.append(("FB", *first, int(found[4]), int(found[5])) if found[4] else (found[1], *first))
    return tasks


def placements(num_ranks: int) -> list[Placement]:
    both = [Placement.bidirectional(num_ranks)] if num_ranks % 2 == 0 else []
    return [Placement.v(num_ranks), Placement.linear(num_ranks), *both]


@pytest.mark.parametrize("name", GOLDEN)
def test_orders_are_those_of_deepseeks_code(name: str) -> None:
    _, _, orders = made(GOLDEN[name])
    assert orders == [tasks_of(rank) for rank in GOLDEN[name]["orders"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_makespan_and_bubbles_are_the_goldens_under_four_costs(name: str) -> None:
    case = GOLDEN[name]
    kind, placement, orders = made(case)
    assert sorted(case["ideal_sim"]) == sorted(COSTS)
    for costs_name, expected in case["ideal_sim"].items():
        costs = COSTS[costs_name]
        simulated = simulate(orders, costs, placement)
        assert simulated.makespan == expected["makespan"]
        assert simulated.bubble == expected["bubble_per_rank"]
        bound = bubble_bound(kind, case["stages"], costs)
        assert bound == expected["formula_bubble"]
        assert max(simulated.bubble) <= bound
        if costs_name == "F1_B2_W1_FB3":  # W = F and FB = F + B: the formula is exact
            assert set(simulated.bubble) == {bound}


@pytest.mark.parametrize("name", GOLDEN)
def test_counts_of_tasks_and_live_chunks(name: str) -> None:
    case = GOLDEN[name]
    _, placement, orders = made(case)
    assert [collections.Counter(task[0] for task in rank) for rank in orders] == case["counts"]
    live = simulate(orders, Costs(), placement).peak_live
    assert live == case["peak_live_forward_chunks"] == [case["stages"] + 1] * case["P"]


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (4, 4), (4, 9), (8, 20)])
def test_bubbles_and_live_chunks_of_linear_schedules(num_ranks: int, num_microbatches: int, costs: Costs) -> None:
    P, M = num_ranks, num_microbatches
    live = {"one_f_one_b": [P - rank for rank in range(P)], "zero_bubble": [P] * P, "gpipe": [M] * P}
    for name in LINEAR:
        simulated = simulate(getattr(schedule, name)(P, M), costs, Placement.linear(P))
        assert simulated.bubble == [pytest.approx(bubble_bound(name, P, costs))] * P, name
        assert simulated.peak_live == live[name], name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_greedy_runs_any_number_of_micro_batches(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 8), label="P")
    placement = data.draw(st.sampled_from(placements(num_ranks)))
    M = data.draw(st.integers(1, 4 * num_ranks), label="M")
    orders = greedy(placement, M)
    for rank in orders:
        parts = [chunk for task in rank for chunk in chunks(task)]
        all_of = {
            (kind, direction, mb)
            for kind in "FB"
            for direction, flow in enumerate(placement.flows)
            for mb in range(placement.count(flow, M))
        }
        assert len(parts) == len(all_of)
        assert set(parts) == all_of
    simulated = simulate(orders, Costs(), placement)
    assert max(simulated.peak_live) <= placement.num_stages + len(placement.flows) - 1


def test_counts_of_two_flows_add_up() -> None:
    placement = Placement.bidirectional(4)
    assert [(placement.count(0, M), placement.count(1, M)) for M in (1, 2, 7)] == [(1, 0), (1, 1), (4, 3)]


@pytest.mark.parametrize("name", get_args(schedule.Name))
def test_a_number_that_a_schedule_does_not_allow_runs_greedily(name: schedule.Name) -> None:
    for M in (1, 7, 8, 9):
        plan = planned(name, 4, M)
        simulate(plan.orders, Costs(), plan.placement)
        allows = name in LINEAR or M == 8 or (name == "dualpipe_v" and M > 8)
        assert plan.is_greedy == (not allows)


@pytest.mark.parametrize("name", get_args(schedule.Name))
def test_ticks_hold_every_task_once_and_after_what_it_needs(name: schedule.Name) -> None:
    plan = planned(name, 4, 10)
    orders = joined(plan.orders)
    assert {task[0] for rank in orders for task in rank} <= {"F", "B", "FB"}
    table = ticks(orders, plan.placement)
    for rank, tasks in enumerate(orders):
        assert [row[rank] for row in table if row[rank]] == tasks
    at = {
        (chunk.kind, plan.placement.flows[chunk.direction], plan.placement.stages[rank][chunk.direction], chunk.mb): t
        for t, row in enumerate(table)
        for rank, task in enumerate(row)
        for chunk in (chunks(task) if task else [])
    }
    for (kind, flow, stage, mb), t in at.items():
        before = [("F", flow, stage - 1, mb)] if kind == "F" else [("F", flow, stage, mb), ("B", flow, stage + 1, mb)]
        assert all(at.get(key, -1) < t for key in before)
    assert all(any(row) for row in table)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_task_list_is_reported_with_rank_and_task(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(get_args(schedule.Name)))
    plan = planned(name, 4, 8)
    rank = data.draw(st.integers(0, 3))
    length = data.draw(st.integers(0, len(plan.orders[rank]) - 1))
    cut = [tasks[:length] if r == rank else tasks for r, tasks in enumerate(plan.orders)]
    with pytest.raises(DeadlockError, match=r"rank \d .*[FBIW][01]\.\d"):
        simulate(cut, Costs(), plan.placement)


def test_a_deadlock_names_who_waits_for_what() -> None:
    orders = schedule.one_f_one_b(4, 4)
    with pytest.raises(DeadlockError, match=r"rank 0 can never run its task 4, B0\.0: it needs B0\.0 of rank 1, which"):
        simulate([orders[0], orders[1][:1], *orders[2:]], Costs(), Placement.linear(4))
    with pytest.raises(DeadlockError, match=r"rank 0 can never run its task 0, B0\.0: it needs F0\.0 of rank 0, which"):
        simulate([[("B", 0, 0), ("F", 0, 0)]], Costs(), Placement.linear(1))
    with pytest.raises(DeadlockError, match=r"rank 0 runs F0\.0 and ends without the gradient of its weights"):
        simulate([[("F", 0, 0), ("I", 0, 0)]], Costs(), Placement.linear(1))


def test_phases_say_what_a_rank_does() -> None:
    table = phases("dualpipe", rank=0, num_ranks=8, num_microbatches=20)
    assert [(phase.repeats, phase.tasks) for phase in table] == [
        (6, ("F own",)),
        (1, ("F own", "F other")),
        (3, ("I other", "W", "F other")),
        (3, ("F own & B other", "F other & B own")),
        (3, ("B other", "F other & B own")),
        (1, ("B other", "I own")),
        (3, ("W", "I own")),
        (1, ("W",)),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.dualpipe(8, 14), "num_microbatches=14 must be even and at least 2 x 8 ranks .* use 16"),
        (lambda: schedule.dualpipe(4, 9), "num_microbatches=9 must be even .* use 10"),
        (lambda: schedule.dualpipe(3, 8), "num_ranks=3 must be even"),
        (lambda: schedule.dualpipe_v(5, 8), "num_stages=5 must be even .* use 6"),
        (lambda: schedule.dualpipe_v(8, 7), "num_microbatches=7 must be at least 2 x 4 ranks .* use 8 or `greedy`"),
        (lambda: schedule.one_f_one_b(0, 8), "num_ranks=0 must be at least 1"),
        (lambda: schedule.gpipe(2, 0), "num_microbatches=0 must be at least 1"),
        (lambda: greedy(Placement.v(2), 0), "num_microbatches=0 must be at least 1"),
        (lambda: Costs(F=0.0), "must all be above 0"),
        (lambda: Costs(W=2.0), "W is a part of B; give a W below 2.0"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
