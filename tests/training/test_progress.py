import io
import math

import pytest
import rich.console

from dsv3_jax.training.metrics import Progress
from dsv3_jax.training.progress import Clock, ProgressBar


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_and_time_left_count_steps_evaluations_and_saves_but_no_compilation():
    time = Time()
    clock = Clock(Progress(10, 1000), flops_per_token=6.0, peak_flops_per_s=1200.0, now=time)
    assert math.isnan(clock.seconds_left(100))
    time.now += 60.0  # compiles
    clock.restart(Progress(10, 1000))
    for step in range(1, 11):
        time.now += 2.0 if step > 5 else 4.0  # the first steps of a process
        speed = clock.lap(Progress(10 + step, 1000 + 100 * step))
        assert speed == pytest.approx((50.0, 0.25) if step > 5 else (25.0, 0.125))
    assert clock.seconds_left(500) == pytest.approx(10.0)
    time.now += 5.0  # evaluates
    clock.pause(Progress(20, 2000), times_after=3.0)
    assert clock.seconds_left(500) == pytest.approx(10.0 * 35 / 30 + 3 * 5.0)
    time.now += 60.0
    clock.restart(Progress(20, 2000))
    assert clock.seconds_left(500) == pytest.approx(10.0 * 35 / 30 + 3 * 5.0)
    assert clock.seconds_left(-10) == pytest.approx(3 * 5.0)


@pytest.mark.parametrize("width", [20, 120])
def test_without_a_terminal_there_is_a_line_every_five_percent_once_the_speed_is_known(width: int):
    out = io.StringIO()
    bar = ProgressBar(rich.console.Console(file=out, width=width, soft_wrap=True), total_tokens=1000, done=0)
    for step in range(1, 101):
        bar.show({"step": step, "tokens": 10 * step, "main_loss": 2.5, "tokens_per_s": 1234.5}, 600.0 - 6 * step)
    bar.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "training  10 %  step 10  loss 2.5000  1,234 tokens/s  9.0 min left"
    assert lines[-1] == "training 100 %  step 100  loss 2.5000  1,234 tokens/s"
    assert len(lines) == 19


@pytest.mark.parametrize("dumb", [True, False])
def test_a_terminal_of_twenty_columns_shows_a_bar_and_a_dumb_one_shows_lines(dumb: bool):
    out = io.StringIO()
    terminal = {"TERM": "dumb" if dumb else "xterm"}
    console = rich.console.Console(file=out, width=20, soft_wrap=True, force_terminal=True, _environ=terminal)
    bar = ProgressBar(console, total_tokens=100, done=0)
    bar.log("compiling the step …")
    for step in range(1, 21):
        bar.show({"step": step, "tokens": 5 * step, "main_loss": 2.5, "tokens_per_s": 1e6}, 1.0)
    bar.close()
    assert ("training  50 %  step 10" in out.getvalue()) == dumb
