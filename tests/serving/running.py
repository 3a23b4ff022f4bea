"""Real servers on free ports, in this process, around engines of a small model."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers

from dsv3_jax.data.tokenizer import BOS, EOS, PAD, TextTokenizer
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.http.app import create_app
from dsv3_jax.serving.http.server import Server, bind

MODEL = "tiny"
MERGES = [("e", "r"), ("i", "n"), ("o", "n"), ("a", "t"), ("Ġ", "t"), ("ð", "Ł"), ("in", "g"), ("Ġt", "h")]
"""One of them is the first half of most emoji."""


def small_tokenizer() -> TextTokenizer:
    """A byte-level tokenizer whose ids fit into the goldens' vocabulary of 256: it lacks bytes that UTF-8 never has."""
    spelt = sorted(pre_tokenizers.ByteLevel.alphabet())
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    tokens = [BOS, EOS, PAD, *(one for one in spelt if one not in never), *(a + b for a, b in MERGES)]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BOS, EOS, PAD])
    return TextTokenizer(inner)


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address at which `app` answers within the block."""
    server = Server(app, bind("127.0.0.1", 0, has_key=False))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        until(lambda: server.started)
        yield server.url
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[str]:
    """The address of a server around an engine, which stays open."""
    with running(create_app(engine, model_name=MODEL, **options)) as url:
        yield url


def until(holds, seconds: float = 60.0) -> None:
    """Waits for a condition; fails long after a slow machine would have met it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def exchange(url: str, data: bytes, *, limit: int = 1 << 20) -> bytes:
    """What a server answers to raw bytes, until it closes or is quiet for a second."""
    host, port = url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while len(answer) < limit and (piece := connection.recv(65536)):
                answer += piece
    return answer
