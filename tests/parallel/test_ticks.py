"""Tables of ticks, run with names in place of arrays."""

import numpy as np
import pytest

from dsv3_jax.parallel.pipeline.schedule import placement_for
from dsv3_jax.parallel.pipeline.ticks import Sizes, Tick, sizes_for, stages_by_place, table

NUMBERS = (1, 2, 3, 7, 8, 13)


def run(name: str, num_ranks: int, num_micro_batches: int, sizes: Sizes) -> list[tuple[str, int, int]]:
    """All chunks that ran, after checking that each found in its slots what it needs.

    What the slot that holds nothing contains is never what somebody needs, so each tick spoils it.
    """
    placement = placement_for(name, num_ranks)
    rows, bounds = table(name, num_ranks, num_micro_batches, sizes)
    last, of_places = placement.num_stages - 1, stages_by_place(placement)
    memory = [{name: [None] * getattr(sizes, name) for name in sizes._fields[1:]} for _ in range(num_ranks)]
    done = []
    for now in range(bounds[-1]):
        sent = []
        for rank in range(num_ranks):
            tick, mine = Tick(*rows[now, rank].tolist()), memory[rank]
            f, b = (tick.f_stage, tick.f_micro), (tick.b_stage, tick.b_micro)
            if f[0] <= last:
                assert of_places[rank, tick.f_place] == f[0]
                assert f[0] == 0 or mine["arrived"][tick.f_input] == f
            if b[0] <= last:
                assert of_places[rank, tick.b_place] == b[0]
                assert mine["stored"][tick.b_stored] == b
                assert mine["gradients"][tick.b_gradient] == b if b[0] < last else mine["ends"][tick.b_end] == b
            mine["stored"][tick.f_stored] = mine["ends"][tick.f_end] = f
            done += [("F", *f)] * (f[0] <= last) + [("B", *b)] * (b[0] <= last)
            sent.append(((f[0] + 1, f[1]), (b[0] - 1, b[1])))
        for rank in range(num_ranks):
            tick, mine = Tick(*rows[now, rank].tolist()), memory[rank]
            nothing = (-1, -1), (-1, -1)
            left = sent[rank - 1] if rank else nothing
            turns = rank == num_ranks - 1 and placement.flows == (0, 0)
            right = sent[rank + 1] if rank < num_ranks - 1 else sent[rank] if turns else nothing
            for (x, gradient), x_slot, g_slot in (
                (left, tick.x_from_left, tick.g_from_left),
                (right, tick.x_from_right, tick.g_from_right),
            ):
                mine["arrived"][x_slot], mine["gradients"][g_slot] = x, gradient
            for slots in mine.values():
                slots[-1] = "spoilt"
    return done


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["dualpipe_v", "dualpipe", "one_f_one_b"])
def test_every_chunk_finds_what_it_needs_whatever_the_number_of_micro_batches(name, num_ranks):
    num_stages, sizes = placement_for(name, num_ranks).num_stages, sizes_for(name, num_ranks, NUMBERS)
    for num in NUMBERS:
        every = {(kind, stage, micro) for kind in "FB" for stage in range(num_stages) for micro in range(num)}
        done = run(name, num_ranks, num, sizes)
        assert len(done) == len(every)
        assert set(done) == every


@pytest.mark.parametrize(("name", "peak"), [("dualpipe_v", 2 * 4 + 1), ("dualpipe", 4 + 1), ("one_f_one_b", 4)])
def test_memory_is_the_peak_of_the_schedule_and_a_slot_for_nothing(name, peak):
    assert sizes_for(name, 4, range(8, 33)).stored == peak + 1


@pytest.mark.parametrize("name", ["dualpipe_v", "dualpipe"])
def test_in_the_steady_run_all_ranks_work_in_the_same_places_in_turn(name):
    rows, (_, first, end, _) = table(name, 4, 20, sizes_for(name, 4, [20]))
    column = {field: rows[first:end, :, at] for at, field in enumerate(Tick._fields)}
    assert end - first >= 14
    assert (column["f_place"] == np.arange(end - first)[:, None] % 2).all()
    assert (column["b_place"] == 1 - column["f_place"]).all()
    assert (np.maximum(column["f_stage"], column["b_stage"]) < placement_for(name, 4).num_stages).all()
