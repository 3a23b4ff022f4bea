"""The serving bench: latencies by vLLM's definitions, loads as asked for, and errors that are counted."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench import serve, serve_turns
from dsv3_jax.bench.http_client import read_response
from dsv3_jax.bench.latency import Answer, is_good, summarize
from dsv3_jax.bench.serve_latency import gaps_around
from dsv3_jax.bench.workload import SHARE_GPT_ANSWER, SHARE_GPT_PROMPT, arrivals, requests

ANSWER = Answer(sent=1.0, arrivals=(1.5, 1.75, 2.5), num_prompt_tokens=7, num_tokens=5)


def test_latencies_of_an_answer():
    assert (ANSWER.ttft, ANSWER.e2el, ANSWER.tpot, ANSWER.itl) == (0.5, 1.5, 0.25, (0.25, 0.75))
    assert Answer(0.0, (1.0,), 1, 1).tpot is None


def test_a_summary_counts_tokens_and_leaves_out_what_an_answer_has_not():
    found = summarize([ANSWER, Answer(1.0, (2.5,), 3, 1)], seconds=2.0, failed=2, limits={"ttft": 600, "tpot": 300})
    assert found["output_throughput"] == 3.0
    assert found["total_token_throughput"] == 8.0
    assert (found["completed"], found["failed"], found["request_throughput"]) == (2, 2, 1.0)
    assert found["mean_ttft_ms"] == 1000
    assert found["mean_tpot_ms"] == 250
    assert found["median_itl_ms"] == 500
    assert (found["good_share"], found["request_goodput"]) == (0.25, 0.5)
    assert "mean_ttft_ms" not in summarize([], seconds=1.0, failed=3)


@pytest.mark.parametrize(("limits", "good"), [({"ttft": 500}, True), ({"itl": 499}, False), ({"e2el": 1499}, False)])
def test_a_good_answer_meets_every_limit(limits, good):
    assert is_good(ANSWER, {"ttft": 1000, **limits}) == good


def test_lengths_have_the_means_of_sharegpt_and_fit_the_model():
    rng = np.random.default_rng(0)
    free = requests(rng, 4000, vocab_size=50, max_length=100_000)
    assert np.mean([len(one.prompt) for one in free]) == pytest.approx(SHARE_GPT_PROMPT, rel=0.1)
    assert np.mean([one.num_tokens for one in free]) == pytest.approx(SHARE_GPT_ANSWER, rel=0.1)
    assert np.median([one.num_tokens for one in free]) < 0.7 * SHARE_GPT_ANSWER
    cut = requests(rng, 200, vocab_size=50, max_length=97, prefix_tokens=60)
    assert len({one.prompt[:60] for one in cut}) == 1
    assert len({one.prompt for one in cut}) == 200
    assert all(len(one.prompt) > 60 and one.num_tokens > 0 for one in cut)
    assert max(len(one.prompt) + one.num_tokens for one in cut) == 97
    assert max(max(one.prompt) for one in cut) < 50


def test_requests_come_as_a_poisson_process():
    due = arrivals(np.random.default_rng(0), 5000, 20.0)
    gaps = np.diff(due)
    assert gaps.mean() == pytest.approx(0.05, rel=0.1)
    assert gaps.std() == pytest.approx(0.05, rel=0.1)
    assert arrivals(np.random.default_rng(0), 3, None) == [0.0, 0.0, 0.0]


def test_gaps_before_and_during_another_request():
    clients = [Answer(0.0, (1.0, 2.0, 4.0, 5.0, 9.0), 1, 5), Answer(0.0, (2.5, 3.5), 1, 2)]
    before, during = gaps_around(clients, Answer(3.0, (5.0,), 1, 1))
    assert (before, during) == ([1.0], [2.0, 1.0, 1.0])


def test_lines_compare_with_what_takes_turns():
    times = {
        **{f"generate batch {count}": [2.0, 1.0] for count in (1, 8)},
        **{f"engine batch {count}": [1.0, 3.0] for count in (1, 8, 16, 32)},
        **{f"server batch {count}": [1.25] for count in (1, 8)},
        "engine top-p batch 8": [1.2],
        **{f"engine batch-invariant batch {count}": [1.5] for count in (1, 8)},
        "transformers serve batch 8": [5.0],
    }
    lines = {line.what: line for line in serve_turns._lines(times, host_ms=2.0)}
    assert lines["engine batch 16, 32 + 128 tokens"].value == 16 * 128
    assert lines["a token with --batch-invariant over one without, batch 8"].value == 1.5
    met = {what: (pytest.approx(line.value), line.is_met) for what, line in lines.items() if line.is_met is not None}
    assert met == {
        "engine over generate, batch 8": (1.0, True),
        "engine, 16 sequences over 8": (2.0, True),
        "engine, 32 sequences over 8": (4.0, True),
        "server with 8 streaming clients over engine": (0.8, True),
        "processor time of the step thread, a step at batch 8": (2.0, False),
        "server over transformers serve, batch 8": (4.0, False),
    }
    top_p = serve_turns._pair_line({"engine top-p batch 8": [1.2, 9.0, 1.2], "engine batch 8": [1.0, 1.0, 2.0]})
    assert (top_p.value, top_p.is_met) == (pytest.approx(1.2), False)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b"")).replace(
        b"0\r\n\r\n\r\n", b"0\r\n\r\n"
    )


def event(**content) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(**choice) -> bytes:
    return event(choices=[choice])


@contextlib.contextmanager
def listening(answer: Callable[[str, bytes], tuple[int, bytes]]) -> Iterator[str]:
    """A server of another make: answers (path, body) by (status, chunked body), and closes."""
    loop, started, address = asyncio.new_event_loop(), threading.Event(), []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(dict(line.split(": ") for line in head.split("\r\n")[1:-2]).get("Content-Length", 0))
        status, body = answer(head.split()[1], await reader.readexactly(length))
        writer.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % status + body)
        await writer.drain()
        writer.close()

    async def serve_until_stopped() -> None:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            address.append(server.sockets[0].getsockname()[1])
            started.set()
            await stopped.wait()

    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve_until_stopped(),))
    thread.start()
    started.wait(10)
    yield f"http://127.0.0.1:{address[0]}/v1"
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


MODELS = chunked(json.dumps({"data": [{"id": "some", "max_model_len": 64}]}).encode())


def test_load_on_any_server(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Three tokens in two pieces, and every fifth request fails in its middle."""
    seen = []

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/models":
            return 200, MODELS
        seen.append(json.loads(body))
        if len(seen) % 5 == 0:
            return 200, chunked(piece(text="a"), event(error={"message": "out of luck"}))
        usage = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 3})
        first, rest = piece(text="a")[:9], piece(text="a")[9:]
        return 200, chunked(piece(text=""), first, rest, piece(token_ids=[5, 6]), usage, b"data: [DONE]\n\n")

    with listening(answer) as url:
        load = ["--url", url, "--concurrency", "1", "3", "--requests", "9", "--rate", "500", "--goal-ttft", "1e9"]
        assert serve.main([*load, "--json", "--plot", str(tmp_path / "load.png")]) == 0
        rows = json.loads(capsys.readouterr().out)["load"]
        assert [row["concurrency"] for row in rows] == [1, 3]
        assert [row["completed"] for row in rows] == [7, 7]
        assert [row["failed"] for row in rows] == [2, 2]
        assert rows[0]["total_output_tokens"] == 21
        assert rows[0]["good_share"] == pytest.approx(7 / 9)
        assert "out of luck" in rows[0]["errors"][0]
        assert (tmp_path / "load.png").stat().st_size > 0
        assert len({tuple(one["prompt"]) for one in seen}) == len(seen) == 20
        assert all(one["model"] == "some" and one["ignore_eos"] for one in seen)
        assert all(len(one["prompt"]) + one["max_tokens"] <= 64 for one in seen)
        seen.clear()
        assert serve.main([*load[:2], "--plain", "--concurrency", "1", "--requests", "2"]) == 0
        assert "TTFT" in capsys.readouterr().out
        assert all(set(one["prompt"].split()) and "ignore_eos" not in one for one in seen)


def test_a_server_that_refuses_is_a_user_error(capsys: pytest.CaptureFixture[str]):
    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        return (200, MODELS) if path == "/v1/models" else (401, chunked(b"no key"))

    with listening(answer) as url:
        assert serve.main(["--url", url]) == 2
        assert "401" in capsys.readouterr().err
    with listening(lambda path, body: (404, chunked(b"nothing here"))) as url:
        assert serve.main(["--url", url]) == 2
        assert "nothing here" in capsys.readouterr().err
    assert serve.main(["--url", url]) == 2
    assert "give http://HOST:PORT/v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --url"),
        (["--url", "http://x", "--config", "y"], "either --url"),
        (["--url", "http://x", "--concurrency", "0"], "--concurrency 0"),
        (["--url", "http://x", "--rate", "-1"], "--rate -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_bodies_of_every_kind_are_read():
    async def read(data: bytes) -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await (await read_response(reader)).read()

    head = b"HTTP/1.1 200 OK\r\n"
    assert asyncio.run(read(head + b"content-length: 3\r\n\r\nabcdef")) == b"abc"
    assert asyncio.run(read(head + b"\r\nabc")) == b"abc"
    assert (
        asyncio.run(read(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"ab", b"c" * 20))) == b"ab" + b"c" * 20
    )
    with pytest.raises(asyncio.IncompleteReadError):
        asyncio.run(read(head + b"content-length: 9\r\n\r\nabc"))
    with pytest.raises(ValueError, match="no answer of an HTTP server"):
        asyncio.run(read(b"SSH-2.0\r\n\r\n"))
