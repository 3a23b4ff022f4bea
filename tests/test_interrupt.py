import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3_jax.interrupt import Stopped, StopRequest

# Native code that no handler of Python's interrupts.
DEAF = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10**9)"


def test_a_call_gives_its_result_or_its_error():
    with StopRequest() as stop:
        assert stop.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            stop.run(divmod, 7, 0)
        with pytest.raises(SystemExit):
            stop.run(sys.exit, 3)
        stop.check()


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_ends_the_wait_for_a_call(number: signal.Signals):
    """Twice the hangup, because closing a terminal sends two."""
    before, answers, goes_on = signal.getsignal(number), [], threading.Event()

    def call() -> None:
        os.kill(os.getpid(), number)
        goes_on.wait(60)

    with StopRequest(answer=answers.append) as stop:
        with pytest.raises(Stopped) as stopped:
            stop.run(call)
        if number == signal.SIGHUP:
            os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Stopped):
            stop.run(divmod, 7, 2)
    goes_on.set()
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def program(code: str, *, before: str = "") -> subprocess.Popen:
    """A process that says "ready" and then runs `code`, once it has said so."""
    lines = f"import signal, sys\n{before}\nfrom dsv3_jax.interrupt import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", lines],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def ended(process: subprocess.Popen, *numbers: signal.Signals) -> tuple[int, str]:
    """Exit code and errors after `numbers` were sent to a process that is ready."""
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, errors


def test_a_program_with_nothing_to_save_ends_at_the_first_signal_in_native_code_too():
    code = f"def main(): print('ready', flush=True); {DEAF}; return 0\nrun_program(main)"
    started = {number: program(code) for number in StopRequest.SIGNALS}
    for number, process in started.items():
        assert ended(process, number) == (128 + number, f"stopped by {number.name}\n")


def test_a_second_signal_ends_the_process_at_once_in_native_code_too():
    code = f"with StopRequest():\n    print('ready', flush=True); {DEAF}"
    assert ended(program(code), signal.SIGINT, signal.SIGTERM) == (128 + signal.SIGTERM, "")


def test_a_hangup_that_nohup_ignores_stays_ignored():
    code = "with StopRequest() as stop:\n    print('ready', flush=True)\n    __import__('time').sleep(1); stop.check()"
    process = program(code, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    assert ended(process, signal.SIGHUP) == (0, "")
