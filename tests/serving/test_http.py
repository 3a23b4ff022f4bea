"""The server from outside: every limit, every error, clients that go away, and its end."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.emitter import Reader
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.http import completions, connection
from dsv3_jax.serving.http.app import create_app
from dsv3_jax.serving.http.server import api_key_of, bind
from dsv3_jax.serving.runner import Runner
from tests.serving.running import MODEL, exchange, running, serving, until

SHAPES = {"max_num_seqs": 8, "num_pages": 12, "max_num_batched_tokens": 64}
IDS = {"model": MODEL, "prompt": [0, 17, 23], "ignore_eos": True}
LONG = {**IDS, "max_tokens": 200}
PATIENCE = 120.0
"""Seconds: a first request waits until its steps are compiled."""

get = functools.partial(httpx.get, timeout=PATIENCE)
post = functools.partial(httpx.post, timeout=PATIENCE)


@pytest.fixture(scope="module")
def engine(engine_of) -> Engine:
    return engine_of("tiny_a")


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture(autouse=True)
def nothing_is_left(engine) -> Iterator[None]:
    yield
    until(lambda: engine.describe()["running"] == engine.describe()["waiting"] == 0)
    engine.check()


def is_error(response: httpx.Response, status: int, *, param: str | None = None) -> bool:
    """Whether an answer is an error in the one form that all have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["error"]["message"].endswith(".")
    return True


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"null", 400, None),
        (b"\xff\xfe\xfd", 400, None),
        (b'{"model": "\xff"}', 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": "tiny", "prompt": [0], "seed": ' + b"9" * 5000 + b"}", 400, None),
        (b'{"model": "tiny"}', 400, "prompt"),
        (b'{"prompt": [0]}', 400, "model"),
        (b'{"model": "tiny", "prompt": [0], "temperature": NaN}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": [0], "temperature": 1e999}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": [0], "top_p": -Infinity}', 400, "top_p"),
        (b'{"model": "tiny", "prompt": [0], "temperature": 1' + b"0" * 400 + b"}", 400, "temperature"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": ["a", "\\udfff"]}', 400, "prompt[1]"),
        (b'{"model": "tiny", "prompt": "a"}', 400, "prompt"),
        (b'{"model": "\\u0000", "prompt": [0]}', 404, "model"),
    ],
)
def test_what_is_no_request_is_an_error_of_the_client(url, content, status, param) -> None:
    headers = {"content-type": "application/json"}
    assert is_error(post(f"{url}/v1/completions", content=content, headers=headers), status, param=param)


def test_routes_methods_and_types(url) -> None:
    assert is_error(get(f"{url}/nowhere"), 404)
    assert is_error(get(f"{url}/v1/models/another"), 404, param="model")
    assert is_error(get(f"{url}/health/"), 404)
    for method, path, allowed in (("GET", "/v1/completions", "POST"), ("POST", "/health", "GET"), ("PUT", "/", "GET")):
        response = httpx.request(method, url + path)
        assert is_error(response, 405)
        assert response.headers["allow"] == allowed
    assert is_error(post(f"{url}/v1/completions", content=json.dumps(IDS)), 415)
    assert is_error(post(f"{url}/v1/completions", data={"a": "b"}), 415)


def test_a_handler_that_fails_answers_500_and_fails_alone(url, engine, monkeypatch, caplog) -> None:
    monkeypatch.setattr(engine, "submit", lambda *_, **__: 1 / 0)
    response = post(f"{url}/v1/completions", json=IDS, headers={"x-request-id": "mine"})
    assert is_error(response, 500)
    assert "division" not in response.text
    assert "mine" in response.json()["error"]["message"]
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert post(f"{url}/v1/completions", json=IDS).status_code == 200


def test_a_body_is_limited_however_it_comes(url, engine) -> None:
    most = engine.serving.max_body_bytes
    fits = json.dumps({**IDS, "max_tokens": 1, "user": ""})
    padding = most - len(fits)
    headers = {"content-type": "application/json"}
    for extra, status in ((0, 200), (1, 413)):
        body = json.dumps({**IDS, "max_tokens": 1, "user": "u" * (padding + extra)}).encode()
        assert post(f"{url}/v1/completions", content=body, headers=headers).status_code == status
        chunked = iter([body[: most // 2], body[most // 2 :]])
        assert post(f"{url}/v1/completions", content=chunked, headers=headers).status_code == status
    assert is_error(post(f"{url}/v1/completions", content=b" " * (most + 1), headers=headers), 413)
    announced = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
    assert exchange(url, announced).startswith(b"HTTP/1.1 413 ")


def test_headers_are_limited(url, engine) -> None:
    most, size = engine.serving.max_headers, engine.serving.max_header_bytes
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    assert exchange(url, head + b"a: b\r\n" * (most - 2) + b"\r\n").startswith(b"HTTP/1.1 200 ")
    assert exchange(url, head + b"a: b\r\n" * (most - 1) + b"\r\n").startswith(b"HTTP/1.1 431 ")
    for too_long in (size, 40 * size):
        answer = exchange(url, head + b"a: " + b"b" * too_long + b"\r\n\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("data", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"])
def test_what_is_no_http_is_told_so(url, data) -> None:
    head, _, body = exchange(url, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_request_to_upgrade_is_a_plain_one(url) -> None:
    asked = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x"}
    assert get(f"{url}/health", headers=asked).json() == {"status": "alive"}


def test_a_request_has_an_id_everywhere(url, caplog) -> None:
    caplog.set_level("INFO", logger="dsv3_jax")
    given = post(f"{url}/v1/completions", json={**IDS, "max_tokens": 1}, headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    assert given.json()["id"] == "cmpl-my-id.7"
    ids = [get(f"{url}/nowhere", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b")]
    assert len({*ids, "", "a b"}) == 4
    long = get(f"{url}/nowhere", headers={"x-request-id": "x" * 129}).headers["x-request-id"]
    assert len(long) < 129


def test_a_key_opens_every_route_but_two(engine) -> None:
    with serving(engine, api_key="the key".replace(" ", "-")) as url:
        for path in ("/health", "/ready"):
            assert get(url + path).status_code == 200
        paths = ("/", "/metrics", "/version", "/openapi.json", "/v1/models", "/nowhere")
        wrong = (None, "Bearer", "Bearer the-kez", "Bearer the-key2", "Basic the-key", "the-key", "Bearer é")
        for path in paths:
            for value in wrong:
                headers = {} if value is None else {"authorization": value.encode()}
                response = get(url + path, headers=headers)
                assert is_error(response, 401)
                asks = 'Basic realm="dsv3-jax"' if path == "/" else "Bearer"  # a browser can send no bearer's token
                assert response.headers["www-authenticate"] == asks
            assert get(url + path, headers={"authorization": "bearer the-key"}).status_code in (200, 404)
        assert is_error(post(f"{url}/v1/completions", json=IDS), 401)
        document = get(f"{url}/openapi.json", headers={"authorization": "Bearer the-key"}).json()
        assert "security" in document["paths"]["/v1/completions"]["post"]
        assert "security" not in document["paths"]["/health"]["get"]


def test_another_host_needs_a_key(monkeypatch, tmp_path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UserError, match="needs a key"):
            bind(host, 0, has_key=False)
    bind("0.0.0.0", 0, has_key=True).close()
    with bind("127.0.0.1", 0, has_key=False) as taken:
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            bind("127.0.0.1", taken.getsockname()[1], has_key=False)
    monkeypatch.delenv("DSV3_API_KEY", raising=False)
    assert api_key_of(None) is None
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert api_key_of(str(file)) == "secret"
    monkeypatch.setenv("DSV3_API_KEY", "other")
    assert (api_key_of(None), api_key_of(str(file))) == ("other", "secret")
    for bad in ("", "two words", "schlüssel"):
        file.write_text(bad)
        with pytest.raises(UserError, match="one word of printable ASCII"):
            api_key_of(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        api_key_of(str(tmp_path / "nothing"))


def test_before_it_is_ready_it_listens_and_says_so(golden_model, monkeypatch) -> None:
    may_go_on = threading.Event()
    monkeypatch.setattr(Runner, "warm_up", lambda self, report: may_go_on.wait(timeout=60))
    engine = Engine(*golden_model("tiny_a"), ServingConfig(**SHAPES), warm_up=lambda done, total: None)
    with engine, serving(engine) as url:
        assert engine.state == "starting"
        assert get(f"{url}/health").status_code == 200
        for response in (get(f"{url}/ready"), post(f"{url}/v1/completions", json=IDS)):
            assert is_error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        may_go_on.set()
        until(lambda: engine.state == "ready")
        assert get(f"{url}/ready").json() == {"status": "ready"}


def test_a_queue_that_is_full_answers_429(golden_model) -> None:
    config = ServingConfig(**SHAPES, max_waiting_tokens=64)
    with Engine(*golden_model("tiny_a"), config) as engine, serving(engine) as url:
        response = post(f"{url}/v1/completions", json={**IDS, "prompt": [[0] * 40] * 12, "max_tokens": 100})
        assert is_error(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        until(lambda: engine.describe()["running"] == 0)
        engine.check()
        assert post(f"{url}/v1/completions", json=IDS).status_code == 200


def test_a_stall_is_told(engine, url, monkeypatch, caplog) -> None:
    monkeypatch.setattr(type(engine), "is_stalled", property(lambda self: True))
    response = get(f"{url}/ready")
    assert is_error(response, 503)
    assert "60 seconds" in response.json()["error"]["message"]
    assert get(f"{url}/health").status_code == 200
    until(lambda: "while work waits: {'state': 'ready'" in caplog.text)


def test_a_stream_is_events_in_order(url) -> None:
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={**IDS, "stream": True, "max_tokens": 3, "return_token_ids": True},
        timeout=PATIENCE,
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert sum(len(choice["token_ids"]) for choice in choices) == 3, "what comes at once is one event"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_failure_behind_the_first_piece_is_an_event(url, engine, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(completions.Usage, "count", fail)
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=PATIENCE) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert json.loads(events[0])["error"]["type"] == "server_error"
    assert events[1:] == ["[DONE]"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_made_is_an_error_and_fails_alone(url, engine, monkeypatch, stream) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "take", lambda *_: 1 // 0)
        response = post(f"{url}/v1/completions", json={**IDS, "max_tokens": 3, "stream": stream})
    if stream:
        assert response.status_code == 200
        assert '"code":"internal_error"' in response.text
    else:
        assert is_error(response, 500)
    assert engine.state == "ready"
    assert post(f"{url}/v1/completions", json={**IDS, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_a_client_that_goes_away_frees_its_pages(url, engine, stream, how) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 4, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        until(lambda: engine.describe()["running"] == 4)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "half":
            connection.shutdown(socket.SHUT_WR)
        else:
            connection.close()
        left = time.monotonic()
        until(lambda: engine.describe()["pages_used"] == 0)
    assert time.monotonic() - left < 1 + 0.25 * 200  # far less than the completions would have taken here


def test_a_client_that_goes_away_while_it_sends(url) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head)
    assert get(f"{url}/health").status_code == 200


def test_a_slow_reader_gets_everything_and_slows_nobody(url, engine) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 4, "stream": True, "return_token_ids": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(head.encode() + b"connection: close\r\n\r\n" + body)
        until(lambda: engine.describe()["running"] > 0)
        assert post(f"{url}/v1/completions", json=IDS).status_code == 200
        until(lambda: engine.describe()["running"] == 0)  # though nobody has read
        answer = b""
        while piece := slow.recv(4096):
            answer += piece
    assert b"[DONE]" in answer
    events = [
        json.loads(part)
        for line in answer.split(b"\n")
        if (part := line.removeprefix(b"data: ")) != line and part[:1] == b"{"
    ]
    counts = [0] * 4
    for event in events:
        for choice in event["choices"]:
            counts[choice["index"]] += len(choice["token_ids"])
    assert counts == [200] * 4


def test_a_client_that_never_reads_is_left(url, monkeypatch) -> None:
    """It asks for more than all buffers between it and the server hold."""
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    size = len(httpx.get(f"{url}/openapi.json").content)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.settimeout(60)
        asked, received = 0, 0
        with contextlib.suppress(ConnectionError):
            while asked < 4000:
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
                asked += 100
            time.sleep(2)
            while piece := deaf.recv(1 << 16):
                received += len(piece)
    assert received < asked * size
    assert get(f"{url}/health").status_code == 200


def test_others_are_answered_while_text_is_cut(url, engine) -> None:
    """Routes run side by side: a long wait in one does not stop /health."""

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            long = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(4)]
            answers = [await client.get("/health") for _ in range(20)]
            return [response.status_code for response in [*answers, *await asyncio.gather(*long)]]

    assert set(asyncio.run(ask())) == {200}


def test_metrics_have_the_names_of_the_field(url, engine) -> None:
    post(f"{url}/v1/completions", json={**IDS, "max_tokens": 2})
    response = get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_count"):
        assert f'dsv3:{name}{{engine="0",model_name="tiny"' in response.text
    with running(create_app(engine, model_name="tiny", metrics_namespace="vllm")) as other:
        text = get(f"{other}/metrics").text
        assert "vllm:kv_cache_usage_perc" in text
        assert "dsv3:" not in text


def test_what_it_tells_about_itself(url, engine) -> None:
    assert get(f"{url}/health").json() == {"status": "alive"}
    assert get(f"{url}/ready").json() == {"status": "ready"}
    assert set(get(f"{url}/version").json()) == {"version"}
    page = get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    document = get(f"{url}/openapi.json").json()
    assert {"/v1/completions", "/v1/models", "/health", "/ready", "/metrics", "/version", "/"} <= set(document["paths"])
    assert not {"/v1/chat/completions", "/tokenize"} & set(document["paths"])  # this model has no tokenizer
    assert "string" not in json.dumps(document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"])
