import time

import pytest

import dsv3_jax.progress
from dsv3_jax.progress import progress


@pytest.mark.parametrize("total", [100, None])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_appears_on_a_terminal_alone_and_leaves_nothing(monkeypatch, capsys, total, is_terminal):
    monkeypatch.setattr(dsv3_jax.progress, "_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
    with progress("working", total) as advance:
        advance(50)
        time.sleep(0.05)  # as native code does, which calls nothing
    out, err = capsys.readouterr()
    assert ("working" in out) is is_terminal
    assert err == ""
    assert is_terminal or out == ""
