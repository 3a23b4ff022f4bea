"""The end of a server's process: it lets requests end, or ends at once, and its port is free again."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

BODY = {"model": "tiny", "prompt": [0, 17, 23], "ignore_eos": True, "stream": True}
PROGRAM = """
import sys
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.interrupt import leave
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.http.app import create_app
from dsv3_jax.serving.http.logs import log_to_stderr
from dsv3_jax.serving.http.server import bind, serve
log_to_stderr()
port, drain_seconds, folder = sys.argv[1:]
sock = bind("127.0.0.1", int(port), has_key=False)
config = ServingConfig(max_num_seqs=2, num_pages=8, max_num_batched_tokens=64, drain_seconds=float(drain_seconds))
engine = Engine(*load_pretrained(folder), config)
leave(serve(create_app(engine, model_name="tiny"), engine, sock))
"""


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """A process that serves, its address, and its log as it comes; killed at the end of the block."""
    environment = os.environ | {"PYTHONWARNINGS": "error", "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    lines: list[str] = []
    try:
        for line in child.stdout:
            lines.append(line)
            if found := re.search(r"listens at (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        reader = threading.Thread(target=lines.extend, args=(child.stdout,))
        reader.start()
        yield child, found[1], lines
        reader.join(60)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@contextlib.contextmanager
def streaming(url: str, max_tokens: int) -> Iterator[Iterator[str]]:
    """A stream whose first event has come."""
    body = BODY | {"max_tokens": max_tokens}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield lines


def test_sigterm_lets_requests_end_and_leaves_nothing(golden) -> None:
    arguments = ("-c", PROGRAM, "0", "60", str(golden / "hf" / "tiny_a"))
    with process(*arguments) as (child, url, lines), streaming(url, 250) as events:
        child.send_signal(signal.SIGTERM)
        while (
            refused := httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=120)
        ).status_code == 200:
            time.sleep(0.005)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        *_, last, done = events
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert child.wait(60) == 0
        port = int(url.rpartition(":")[2])
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
    assert "SIGTERM: no new requests" in "".join(lines)
    assert not re.search("Traceback|Warning|ERROR", "".join(lines)), "".join(lines)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_a_killed_server_starts_again(golden) -> None:
    folder, port = str(golden / "hf" / "tiny_a"), "0"
    for second in (signal.SIGTERM, signal.SIGINT):
        with process("-c", PROGRAM, port, "60", folder) as (child, url, _), streaming(url, 250):
            port = url.rpartition(":")[2]
            child.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            child.send_signal(second)
            assert child.wait(10) == 128 + second
    with process("-c", PROGRAM, port, "60", folder) as (child, url, _), streaming(url, 250):
        child.kill()
        child.wait(10)
    with process("-c", PROGRAM, port, "60", folder) as (child, url, _):
        assert url.endswith(f":{port}")
        assert httpx.get(f"{url}/ready").status_code == 200
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0


@pytest.mark.slow
def test_what_runs_longer_than_the_drain_is_aborted(golden) -> None:
    arguments = ("-c", PROGRAM, "0", "0", str(golden / "hf" / "tiny_a"))
    with process(*arguments) as (child, url, lines), streaming(url, 250) as events:
        child.send_signal(signal.SIGTERM)
        *_, last, done = events
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert done == "data: [DONE]"
        assert child.wait(30) == 0
    assert "what still runs is aborted" in "".join(lines)
