"""Conversations as ids, against the chat template that was released with the tokenizer."""

import json
import shutil
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.config.check import UserError
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.serving.chat_format import NAMES, ChatFormat, chat_format_of
from dsv3_jax.serving.errors import RequestError
from tests.serving.conftest import RELEASED_TOKENIZER

MARKS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<|EOT|>",
]
BOS, USER, ASSISTANT, EOS = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def template() -> str:
    return json.loads((RELEASED_TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train(iter(["def f(x):\n    return x\n" * 20]), vocab_size=300)


@pytest.fixture(scope="module")
def rendered(template) -> Callable[[list[dict]], str]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    return lambda messages: compiled.render(messages=messages, bos_token=BOS, add_generation_prompt=True)


# Golden renderings


def test_conversations_of_the_golden_file(released_tokenizer, golden):
    cases = json.loads((golden / "chat_format.json").read_text(encoding="utf-8"))
    chat = ChatFormat("v3", released_tokenizer)
    with_tools = {"tool_round", "two_tools", "two_rounds"}
    for name in cases.keys() - {"_about"} - with_tools:
        ids = chat.encode(cases[name]["messages"])
        assert ids == cases[name]["ids"], name
        assert released_tokenizer.decode(ids) == cases[name]["text"], name
    for name in with_tools:
        with pytest.raises(RequestError, match=r"messages\[1\].tool_calls: tools are not supported"):
            chat.encode(cases[name]["messages"])


PAST = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "<think>Hmm</think>I am DeepSeek"},
    {"role": "user", "content": "1+1=?"},
]


@pytest.mark.parametrize(
    ("name", "thinking", "before", "last"),
    [
        ("r1", None, "", "<think>\n"),
        ("r1", True, "", "<think>\n"),
        ("v3.1", None, "</think>", "</think>"),
        ("v3.1", False, "</think>", "</think>"),
        ("v3.1", True, "</think>", "<think>"),
        ("v3", False, "", ""),
    ],
)
def test_each_format_opens_the_reply_its_way(released_tokenizer, name, thinking, before, last):
    chat = ChatFormat(name, released_tokenizer)
    assert released_tokenizer.decode(chat.encode(PAST, thinking=thinking)) == (
        f"{BOS}You are a helpful assistant{USER}Who are you?{ASSISTANT}{before}I am DeepSeek{EOS}"
        f"{USER}1+1=?{ASSISTANT}{last}"
    )
    assert chat.is_thinking(thinking) == (last.startswith("<think>"))


def test_earlier_thoughts_are_cut_at_the_first_mark_in_v31_and_at_the_last_before(released_tokenizer):
    messages = [{"role": "assistant", "content": "a</think>b</think>c"}, {"role": "user", "content": "?"}]
    texts = {name: released_tokenizer.decode(ChatFormat(name, released_tokenizer).encode(messages)) for name in NAMES}
    assert f"{ASSISTANT}c{EOS}" in texts["v3"]
    assert f"{ASSISTANT}c{EOS}" in texts["r1"]
    assert f"{ASSISTANT}</think>b</think>c{EOS}" in texts["v3.1"]
    assert f"Assistant: a</think>b</think>c{EOS}" in texts["plain"]


def test_plain_is_v2s_form(trained):
    chat = ChatFormat("plain", trained)
    messages = [*PAST[:2], {"role": "assistant", "content": "I am."}, PAST[3]]
    ids = chat.encode(messages)
    eos = tokenizers.EOS
    assert trained.decode(ids) == (
        f"{tokenizers.BOS}You are a helpful assistant\n\nUser: Who are you?\n\nAssistant: I am.{eos}"
        "User: 1+1=?\n\nAssistant:"
    )
    assert [i for i in ids if i < 6] == [0, 1]
    without = ChatFormat("plain", tokenizers.TextTokenizer(trained._inner, bos_id=None, eos_id=None))
    assert trained.decode(without.encode(messages)).endswith("Assistant: I am.\n\nUser: 1+1=?\n\nAssistant:")


# Against the released template

texts = st.lists(st.sampled_from([*MARKS, "a", " b", "\n", "1", "日", "🎉"]) | st.text(max_size=5), max_size=6).map(
    "".join
)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100)
@given(messages=conversations)
def test_text_is_that_of_the_released_template(released_tokenizer, rendered, messages):
    ids = ChatFormat("v3", released_tokenizer).encode(messages)
    assert released_tokenizer.decode(ids) == rendered(messages)


@settings(max_examples=60)
@given(messages=conversations)
def test_ids_are_those_of_the_rendered_text_where_nobody_writes_a_mark(released_tokenizer, rendered, messages):
    for message in messages:
        for mark in MARKS:
            message["content"] = message["content"].replace(mark, "")
    ids = ChatFormat("v3", released_tokenizer).encode(messages)
    assert ids == released_tokenizer._inner.encode(rendered(messages), add_special_tokens=False).ids


@settings(max_examples=100)
@given(messages=conversations, name=st.sampled_from(NAMES))
def test_no_text_becomes_a_mark(released_tokenizer, messages, name):
    chat = ChatFormat(name, released_tokenizer)
    blank = [{**message, "content": ""} for message in messages]
    marks = [i for i in chat.encode(messages) if i in (0, 1, 2) or i >= 128_798]
    assert marks == [i for i in chat.encode(blank) if i in (0, 1, 2) or i >= 128_798]


# Which format


def test_a_folder_shows_its_format(released_tokenizer, trained, tmp_path, template):
    def found(chat_template, tokenizer=released_tokenizer):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
        chat = chat_format_of(tmp_path, tokenizer)
        return chat and chat.name

    assert chat_format_of(tmp_path, trained).name == "plain"  # no file
    assert found(None) == found(7) == "plain"
    assert found(template) == "v3"
    assert found(template.replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜><think>\\n'}}")) == "r1"
    assert found(template.replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜></think>'}}")) == "v3.1"
    assert found(template.replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜>'}}{{- '</think>' }}")) == "v3.1"
    assert found([{"name": "tool", "template": "x"}, {"name": "default", "template": template}]) == "v3"
    assert found(template, trained) == "plain"
    assert found("{{ '<|im_user|>' }}") is None
    (tmp_path / "chat_template.jinja").write_text(template)
    assert found("{{ '<|im_user|>' }}") == "v3"
    assert chat_format_of(tmp_path, released_tokenizer, name="r1").name == "r1"


def test_the_released_folder_is_v3(released_tokenizer, tmp_path):
    shutil.copy(RELEASED_TOKENIZER / "tokenizer_config.json", tmp_path)
    assert chat_format_of(tmp_path, released_tokenizer).name == "v3"


def test_formats_that_cannot_be_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="'v4' is unknown; choose one of v3, r1, v3.1, plain"):
        chat_format_of(tmp_path, trained, name="v4")
    with pytest.raises(UserError, match="'v3' needs <｜User｜> <｜Assistant｜>, which the tokenizer lacks"):
        chat_format_of(tmp_path, trained, name="v3")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json: cannot be read"):
        chat_format_of(tmp_path, trained)


# Messages


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "7"}, "role"),
        ({"role": "function", "content": "7"}, "role"),
        ({"role": "narrator", "content": "7"}, "role"),
        ({"role": ["user"], "content": "7"}, "role"),
        ({"content": "7"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": 7}, "content"),
        ({"role": "user", "content": "\ud83c"}, "content"),
        ({"role": "user", "content": ["hi"]}, "content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}, "content[1].text"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "assistant", "content": "a", "prefix": True}, "prefix"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_field(trained, message, param):
    with pytest.raises(RequestError) as error:
        ChatFormat("plain", trained).encode([{"role": "user", "content": "a"}, message])
    assert error.value.param == f"messages[1].{param}"


def test_an_empty_conversation_is_refused(trained):
    with pytest.raises(RequestError) as error:
        ChatFormat("plain", trained).encode([])
    assert error.value.param == "messages"


def test_other_ways_to_write_the_same_messages(trained):
    chat = ChatFormat("plain", trained)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat.encode([{"role": "user", "content": parts}]) == chat.encode([{"role": "user", "content": "a\nb"}])
    assert chat.encode([{"role": "developer", "content": "a"}]) == chat.encode([{"role": "system", "content": "a"}])
    extra = {"role": "assistant", "content": "a", "reasoning_content": "b", "name": "c", "tool_calls": None}
    assert chat.encode([extra]) == chat.encode([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(("name", "thinking"), [("v3", True), ("plain", True), ("r1", False)])
def test_a_thinking_mode_that_the_model_lacks_is_refused(released_tokenizer, name, thinking):
    with pytest.raises(RequestError, match=f"thinking={thinking}"):
        ChatFormat(name, released_tokenizer).encode(PAST, thinking=thinking)
