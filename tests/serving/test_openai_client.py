"""What OpenAI's own client gets from a real server."""

import json
import math
import re

import httpx
import numpy as np
import openai
import pytest

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.engine import Engine
from tests.serving.running import MODEL, serving, small_tokenizer

KEY = "a-key-of-many-words"
IDS = [0, 17, 23, 42, 99]
EVERY_GOLDEN = ["tiny_a", *(pytest.param(f"tiny_{letter}", marks=pytest.mark.slow) for letter in "bcd")]


@pytest.fixture(scope="module")
def engine(golden_model):
    """One with a tokenizer, and with the shapes of the shared engines."""
    cfg, variables = golden_model("tiny_a")
    serving_config = ServingConfig(max_num_seqs=8, num_pages=12, max_num_batched_tokens=64)
    with Engine(cfg, variables, serving_config, small_tokenizer()) as engine:
        yield engine
        engine.check()


@pytest.fixture(scope="module")
def client(engine):
    options = {"api_key": KEY, "chat_format": ChatFormat("plain", engine.tokenizer)}
    with (
        serving(engine, **options) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client,
    ):
        yield client


def greedy(client, prompt, **fields):
    """A completion of the likeliest tokens."""
    fields = {"max_tokens": 12, "temperature": 0, **fields}
    extra = {"ignore_eos": True, "return_token_ids": True, **fields.pop("extra_body", {})}
    return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **fields)


def test_completes(client, engine) -> None:
    answer = greedy(client, "Once upon a time")
    [choice] = answer.choices
    assert answer.model == MODEL
    assert answer.object == "text_completion"
    assert choice.finish_reason == "length"
    assert choice.text == engine.tokenizer.decode(choice.token_ids, skip_special=True)
    assert choice.prompt_token_ids == engine.tokenizer.prompt("Once upon a time")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(choice.prompt_token_ids), 12)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_sixteen_tokens_at_temperature_one_are_the_default(client) -> None:
    drawn = [client.completions.create(model=MODEL, prompt=IDS, extra_body={"ignore_eos": True}) for _ in range(3)]
    assert [answer.usage.completion_tokens for answer in drawn] == [16] * 3
    assert len({answer.choices[0].text for answer in drawn}) > 1


def test_a_stream_gives_the_same_and_counts(client) -> None:
    whole = greedy(client, "Once")
    chunks = list(greedy(client, "Once", stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [i for chunk in pieces for i in chunk.choices[0].token_ids] == whole.choices[0].token_ids
    assert [chunk.choices[0].finish_reason for chunk in pieces][-1] == "length"
    assert {chunk.choices[0].finish_reason for chunk in pieces[:-1]} <= {None}
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_holds_whole_characters(client) -> None:
    """Four-byte characters, drawn byte by byte."""
    emoji = "🙂".encode()
    tokenizer = small_tokenizer()
    bias = {str(token): 100 for token in range(256) if tokenizer.token_bytes(token) in [bytes([b]) for b in emoji]}
    texts = []
    for seed in range(4):
        fields = {"stream": True, "seed": seed, "max_tokens": 24, "logit_bias": bias, "temperature": 1}
        texts.append([chunk.choices[0].text for chunk in greedy(client, "Say", **fields)])
    for text in texts:
        assert all("\ufffd" not in piece or len(piece) > 0 for piece in text)
        whole = "".join(text)
        assert whole == whole.encode().decode()
        assert whole


def test_prompts_may_be_texts_or_ids_one_or_many(client, engine) -> None:
    ids = engine.tokenizer.prompt("ab")
    alone = greedy(client, "ab").choices[0].token_ids
    assert greedy(client, ids).choices[0].token_ids == alone
    for many in (["ab", "cd"], [ids, engine.tokenizer.prompt("cd")]):
        answer = greedy(client, many, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.token_ids for choice in answer.choices[:2]] == [alone] * 2
        assert answer.choices[2].prompt_token_ids == engine.tokenizer.prompt("cd")
        assert answer.usage.prompt_tokens == 2 * len(ids)
        assert answer.usage.completion_tokens == 4 * 12


def test_n_draws_differ_and_a_seed_repeats_them(client) -> None:
    def draw(**fields):
        fields = {"temperature": 1, "n": 4, **fields}
        return [choice.token_ids for choice in greedy(client, IDS, **fields).choices]

    first = draw(seed=7)
    assert len(set(map(tuple, first))) > 1
    assert draw(seed=7) == first
    assert draw(seed=8) != first
    assert draw(seed=7, n=1) == first[:1]


def test_stop_strings_end_a_text_wherever_chunks_are_cut(client) -> None:
    text = greedy(client, "Once", max_tokens=30).choices[0].text
    stop = text[4:8]
    assert len(stop) == 4
    end = text.index(stop)
    for extra, expected in (({}, text[:end]), ({"include_stop_str_in_output": True}, text[: end + 4])):
        whole = greedy(client, "Once", max_tokens=30, stop=["never there", stop], extra_body=extra)
        assert whole.choices[0].text == expected
        assert whole.choices[0].finish_reason == "stop"
        assert whole.choices[0].stop_reason == stop
        stream = list(greedy(client, "Once", max_tokens=30, stop=stop, stream=True, extra_body=extra))
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        assert stream[-1].choices[0].finish_reason == "stop"


def test_stop_ids_end_a_completion(client) -> None:
    ids = greedy(client, IDS).choices[0].token_ids
    stop = next(i for i in ids[3:] if i not in ids[:3])
    choice = greedy(client, IDS, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert choice.token_ids == ids[: ids.index(stop) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_log_probabilities_of_a_completion(client) -> None:
    choice = greedy(client, "Once", logprobs=3).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert math.isclose(top[token], logprob)  # greedy: the likeliest one
        assert logprob == max(top.values()) <= 0
        assert 1 <= len(top) <= 4
    assert found.text_offset == sorted(found.text_offset)
    pieces = [chunk.choices[0].logprobs for chunk in greedy(client, "Once", logprobs=3, stream=True)]
    assert [token for piece in pieces for token in piece.tokens] == found.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == found.text_offset


def test_an_echo_gives_the_prompt_and_its_log_probabilities(client) -> None:
    read = greedy(client, "Once more", echo=True, logprobs=0, max_tokens=0)
    [choice] = read.choices
    assert choice.text == "Once more"
    assert choice.token_ids == []
    assert choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == read.usage.prompt_tokens
    for token, offset in zip(choice.logprobs.tokens[1:], choice.logprobs.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)

    both = greedy(client, "Once more", echo=True, logprobs=0, max_tokens=3).choices[0]
    assert both.text.startswith("Once more")
    assert len(both.logprobs.tokens) == read.usage.prompt_tokens + 3
    np.testing.assert_allclose(both.logprobs.token_logprobs[1:-3], choice.logprobs.token_logprobs[1:], atol=1e-5)
    # The chance of the completion itself, as what follows a longer prompt.
    ids = [*choice.prompt_token_ids, *both.token_ids]
    again = greedy(client, ids, echo=True, logprobs=0, max_tokens=0).choices[0]
    np.testing.assert_allclose(again.logprobs.token_logprobs[-3:], both.logprobs.token_logprobs[-3:], atol=1e-5)


def chat(client, content="Hello", **fields):
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **fields)


def test_chats(client, engine) -> None:
    answer = chat(client, extra_body={"return_token_ids": True})
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content == engine.tokenizer.decode(choice.token_ids, skip_special=True)
    assert engine.tokenizer.decode(answer.prompt_token_ids) == "<|bos_token|>Be brief.\n\nUser: Hello\n\nAssistant:"
    parts = [{"type": "text", "text": text} for text in "Hello"]
    in_parts = chat(client, content=parts * 5).choices[0].message.content
    assert in_parts == chat(client, content="\n".join("Hello" * 5)).choices[0].message.content


def test_a_chat_streams_deltas(client) -> None:
    whole = chat(client, n=2)
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [piece.delta.role for piece in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
        text = "".join(piece.delta.content or "" for piece in pieces)
        assert text == whole.choices[index].message.content
        assert pieces[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16


def test_a_chat_may_be_as_long_as_fits(client, engine) -> None:
    answer = chat(client, max_tokens=None, extra_body={"return_token_ids": True})
    assert answer.usage.total_tokens == engine.max_length
    assert answer.choices[0].finish_reason == "length"


def test_more_tokens_than_fit_may_be_the_least(client) -> None:
    for max_tokens in (4, None):
        answer = chat(client, max_tokens=max_tokens, extra_body={"min_tokens": 10**12, "ignore_eos": False})
        assert answer.choices[0].finish_reason == "length"


def test_log_probabilities_of_a_chat(client) -> None:
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 8
    for place in content:
        assert len(place.top_logprobs) == 2
        assert place.top_logprobs[0].token == place.token
        assert place.logprob <= 0
        assert place.bytes is None or place.token.startswith("bytes:") or bytes(place.bytes).decode() == place.token


def test_text_is_never_a_mark(client, engine) -> None:
    text = "a<|eos_token|>b"
    answer = chat(client, content=text, extra_body={"return_token_ids": True})
    assert answer.prompt_token_ids.count(engine.tokenizer.eos_id) == 0
    assert text in engine.tokenizer.decode(answer.prompt_token_ids)


def test_a_prefix_is_found_again_unless_the_salt_differs(client) -> None:
    prompt = [0, *(7 + i % 240 for i in range(150))]
    for salt, cached in (("a", 0), ("a", 128), ("b", 0)):
        usage = greedy(client, prompt, max_tokens=1, extra_body={"cache_salt": salt}).usage
        assert usage.prompt_tokens_details.cached_tokens == cached


@pytest.mark.parametrize("name", EVERY_GOLDEN)
def test_without_a_tokenizer_ids_go_in_and_out(name, engine_of, golden) -> None:
    expected = np.load(golden / "hf" / name / "expected.npz")
    prompts, ids = expected["prompt_ids"].tolist(), expected["generated_ids"]
    with serving(engine_of(name)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = greedy(client, prompts, max_tokens=ids.shape[1])
        np.testing.assert_array_equal([choice.token_ids for choice in answer.choices], ids)
        assert [choice.prompt_token_ids for choice in answer.choices] == prompts
        found = greedy(client, prompts[0], logprobs=1).choices[0].logprobs
        assert all(re.fullmatch(r"token_id:\d+", token) for token in found.tokens)
        for call in (
            lambda: greedy(client, "text"),
            lambda: greedy(client, prompts[0], stop="text"),
            lambda: chat(client),
        ):
            with pytest.raises(openai.BadRequestError, match="tokenizer"):
                call()


@pytest.mark.parametrize(
    ("error", "fields", "param"),
    [
        (openai.NotFoundError, {"model": "another"}, "model"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"temperature": 2.5}, "temperature"),
        (openai.BadRequestError, {"top_p": 0}, "top_p"),
        (openai.BadRequestError, {"n": 17}, "n"),
        (openai.BadRequestError, {"n": 0}, "n"),
        (openai.BadRequestError, {"logprobs": 21}, "logprobs"),
        (openai.BadRequestError, {"prompt": ""}, "prompt"),
        (openai.BadRequestError, {"prompt": []}, "prompt"),
        (openai.BadRequestError, {"prompt": [0, 256]}, "prompt"),
        (openai.BadRequestError, {"prompt": [0, -1]}, "prompt[1]"),
        (openai.BadRequestError, {"prompt": {"a": 1}}, "prompt"),
        (openai.BadRequestError, {"max_tokens": -1}, "max_tokens"),
        (openai.BadRequestError, {"max_tokens": "16"}, "max_tokens"),
        (openai.BadRequestError, {"max_tokens": True}, "max_tokens"),
        (openai.BadRequestError, {"max_tokens": 10**30}, "max_tokens"),
        (openai.BadRequestError, {"prompt": [0] * 200, "max_tokens": 57}, "max_tokens"),
        (openai.BadRequestError, {"stop": ["a"] * 17}, "stop"),
        (openai.BadRequestError, {"stop": "a" * 257}, "stop"),
        (openai.BadRequestError, {"logit_bias": {"256": 1}}, "logit_bias"),
        (openai.BadRequestError, {"logit_bias": {"one": 1}}, "logit_bias"),
        (openai.BadRequestError, {"logit_bias": {"1": 101}}, "logit_bias"),
        (openai.BadRequestError, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        (openai.BadRequestError, {"extra_body": {"stop_token_ids": [1] * 65}}, "stop_token_ids"),
        (openai.BadRequestError, {"extra_body": {"min_p": 2}}, "min_p"),
        (openai.BadRequestError, {"best_of": 2}, "best_of"),
        (openai.BadRequestError, {"suffix": "end"}, "suffix"),
        (openai.BadRequestError, {"extra_body": {"audio": {"voice": "a"}}}, "audio"),
        (openai.BadRequestError, {"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ],
)
def test_what_cannot_be_answered_names_the_field(client, error, fields, param) -> None:
    fields = {"model": MODEL, "prompt": "a", "max_tokens": 1, **fields}
    with pytest.raises(error) as caught:
        client.completions.create(**fields)
    assert caught.value.param == param
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_a_sum_that_is_too_long_names_both_numbers(client) -> None:
    with pytest.raises(openai.BadRequestError, match=r"200 tokens and max_tokens=57.*at most 256"):
        client.completions.create(model=MODEL, prompt=[0] * 200, max_tokens=57)
    assert client.completions.create(model=MODEL, prompt=[0] * 200, max_tokens=56).usage.completion_tokens <= 56


def test_fields_of_openai_that_change_nothing_are_taken(client, caplog) -> None:
    caplog.set_level("INFO", logger="dsv3_jax")
    extra = {"best_of": 1, "suffix": "", "store": True, "nobody_knows": {"a": [1]}, "response_format": {"type": "text"}}
    for _ in range(2):
        greedy(client, "a", user="somebody", extra_body=extra)
    lines = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
    assert sorted(line.split("'")[1] for line in lines).count("nobody_knows") == 1


def test_the_wrong_key_and_a_full_queue(client, engine, golden_model) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    full = ServingConfig(max_num_seqs=8, num_pages=12, max_num_batched_tokens=64, max_waiting_requests=2)
    with (
        Engine(*golden_model("tiny_a"), full) as small,
        serving(small) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        greedy(other, [IDS, IDS], n=16)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_models_and_tokens(client, engine) -> None:
    [card] = client.models.list().data
    assert (card.id, card.max_model_len) == (MODEL, engine.max_length)
    assert client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    root = str(client.base_url).removesuffix("/v1/")
    headers = {"authorization": f"Bearer {KEY}"}

    def post(route, **body):
        return httpx.post(root + route, json=body, headers=headers, timeout=120).raise_for_status().json()

    cut = post("/tokenize", prompt="the 🙂", return_token_strs=True)
    assert cut["tokens"] == engine.tokenizer.prompt("the 🙂")
    assert cut["count"] == len(cut["tokens"]) == len(cut["token_strs"])
    assert cut["token_strs"][0] == "<|bos_token|>"
    assert any(text.startswith("bytes:\\xf0") for text in cut["token_strs"])
    bare = post("/tokenize", model=MODEL, prompt="the 🙂", add_special_tokens=False)["tokens"]
    assert bare == cut["tokens"][1:]
    assert post("/detokenize", tokens=bare)["prompt"] == "the 🙂"
    asked = post("/tokenize", messages=[{"role": "user", "content": "a"}])["tokens"]
    assert json.dumps(engine.tokenizer.decode(asked)) == json.dumps("<|bos_token|>User: a\n\nAssistant:")
