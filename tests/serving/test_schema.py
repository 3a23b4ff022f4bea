"""The OpenAPI schema and the server say the same: what it allows is answered, what it forbids is refused."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.admission import tokens_to_come
from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.http.openapi import numbers_up_to
from dsv3_jax.serving.http.protocol import CompletionRequest
from dsv3_jax.serving.http.sampling import completion_params
from tests.serving.running import MODEL, serving, small_tokenizer


@pytest.fixture(scope="module")
def url(golden_model) -> Iterator[str]:
    """A server whose model ends nearly every text at once, with room for 4032 tokens of a prompt and 64 behind it."""
    config = ServingConfig(max_num_seqs=8, num_pages=64, max_num_batched_tokens=64, max_output_tokens=64)
    cfg, variables = golden_model("tiny_b")
    cfg = dataclasses.replace(cfg, max_position=4096)
    with Engine(cfg, variables, config, small_tokenizer(), eos_ids=range(8, 256)) as engine:
        with serving(engine, chat_format=ChatFormat("plain", engine.tokenizer)) as url:
            yield url
        engine.check()


@pytest.mark.parametrize("num_examples", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_drawn_requests(url: str, tmp_path: Path, num_examples: int) -> None:
    """Schemathesis as users run it: its pytest plugin draws no boundary values, and fails with pytest 9.2.

    A schema limits prompts and max_tokens, and cannot limit their sum; so this server has `max_output_tokens`. Nor
    does it limit what is a prompt's text: of that, up to 1300 bytes are drawn, a token each.
    """
    program = Path(sys.executable).with_name("schemathesis")
    arguments = ["run", f"{url}/openapi.json", "--mode", "all", "--max-examples", str(num_examples)]
    arguments += ["--seed", "11", "--no-color", "--request-timeout", "120"]
    result = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-20_000:]


def test_prompts_and_completions_have_limits_of_their_own(url: str) -> None:
    def ask(num_prompt: int, max_tokens: int) -> httpx.Response:
        body = {"model": MODEL, "prompt": [0] * num_prompt, "max_tokens": max_tokens, "ignore_eos": True}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=120)

    assert ask(2, 64).json()["usage"]["total_tokens"] == 66
    assert tokens_to_come(4032, 64, max_length=4096, max_output_tokens=64) == 64
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_output_tokens"] == 64
    for size, field, message in (
        ((1, 65), "max_tokens", "max_tokens=65 .* at most 64"),
        ((4033, 1), "prompt", "4033 tokens.* at most 4032, as 64 of 4096"),
    ):
        answer = ask(*size)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert re.search(message, answer.json()["error"]["message"])
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == 64


def test_who_asks_for_no_number_of_tokens_gets_no_more_than_allowed() -> None:
    body = CompletionRequest(model=MODEL, prompt=[0])
    assert [completion_params(body, most=most).max_tokens for most in (8, 64)] == [8, 16]


def test_a_limit_of_completions_must_leave_room_for_a_prompt(golden_model) -> None:
    with pytest.raises(ConfigError, match=r"max_output_tokens=64 of 64 tokens in all leaves none .* lower it"):
        Engine(*golden_model("tiny_b"), ServingConfig(num_pages=1, max_output_tokens=64))


def test_the_schema_names_the_model_and_the_stream(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    bodies = document["components"]["schemas"]
    for path, body in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest")):
        assert bodies[body]["properties"]["model"] == {"type": "string", "enum": [MODEL]}
        answers = document["paths"][path]["post"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "413", "429", "503"} <= set(answers)
        assert "422" not in answers


@pytest.mark.parametrize("last", [0, 9, 10, 101, 255, 8191])
def test_the_pattern_of_token_ids_is_exact(last: int) -> None:
    pattern = re.compile(numbers_up_to(last))
    assert [i for i in range(2 * last + 20) if pattern.search(str(i))] == list(range(last + 1))
    assert not any(pattern.search(text) for text in ("", "00", "01", "-1", "1.0", " 1"))
