"""Chats with a model that thinks, through a server: reasoning and content apart."""

import json
from collections.abc import Iterator

import openai
import pytest
from tokenizers import Tokenizer

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.chat_format import ASSISTANT, CLOSE, OPEN, USER, ChatFormat
from dsv3_jax.serving.engine import Engine
from tests.serving.running import MODEL, serving, small_tokenizer

CHAT = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Bytes and the marks of turns and thoughts, within the golden models' vocabulary of 256."""
    parsed = json.loads(small_tokenizer().to_json())
    parsed["model"]["vocab"] = {token: i for token, i in parsed["model"]["vocab"].items() if i < 246}
    parsed["model"]["merges"] = []
    inner = Tokenizer.from_str(json.dumps(parsed))
    inner.add_tokens([USER, ASSISTANT, OPEN, CLOSE])
    return TextTokenizer(inner)


@pytest.fixture(scope="module")
def client(golden_model, tokenizer) -> Iterator[openai.OpenAI]:
    room = ServingConfig(max_num_seqs=8, num_pages=12, max_num_batched_tokens=64)
    engine = Engine(*golden_model("tiny_a"), room, tokenizer)
    with (
        engine,
        serving(engine, chat_format=ChatFormat("r1", tokenizer)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as asking,
    ):
        yield asking


def asked(tokenizer: TextTokenizer) -> dict:
    """A call whose replies close their thoughts sooner or later."""
    return {
        "model": MODEL,
        "messages": CHAT,
        "max_tokens": 24,
        "n": 4,
        "seed": 3,
        "temperature": 1,
        "logit_bias": {str(tokenizer.id_of(CLOSE)): 3},
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }


def test_what_is_before_the_closing_mark_is_reasoning(client: openai.OpenAI, tokenizer: TextTokenizer) -> None:
    answer = client.chat.completions.create(**asked(tokenizer))
    num_whole = 0
    for choice in answer.choices:
        ids = choice.model_extra["token_ids"]
        at = [*ids, tokenizer.id_of(CLOSE)].index(tokenizer.id_of(CLOSE))
        reasoning, content = (tokenizer.decode(part, skip_special=True) for part in (ids[:at], ids[at + 1 :]))
        assert choice.message.model_extra["reasoning_content"] == (reasoning or None)
        assert choice.message.content == content
        num_whole += 0 < at < len(ids) - 1
    assert num_whole > 0


def test_a_stream_has_the_same_parts(client: openai.OpenAI, tokenizer: TextTokenizer) -> None:
    call = asked(tokenizer)
    whole = client.chat.completions.create(**call)
    parts = {number: ["", ""] for number in range(4)}
    for event in client.chat.completions.create(**call, stream=True):
        for choice in event.choices:
            extra = choice.delta.model_extra or {}
            parts[choice.index][0] += extra.get("reasoning_content") or ""
            parts[choice.index][1] += choice.delta.content or ""
    for choice in whole.choices:
        reasoning = choice.message.model_extra["reasoning_content"] or ""
        assert parts[choice.index] == [reasoning, choice.message.content]


@pytest.mark.parametrize(
    "switch", [{"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"thinking": False}}], ids=str
)
def test_a_model_that_always_thinks_cannot_be_told_not_to(client: openai.OpenAI, switch: dict) -> None:
    with pytest.raises(openai.BadRequestError, match="always thinks"):
        client.chat.completions.create(model=MODEL, messages=CHAT, extra_body=switch)  # pyright: ignore
