"""Replies taken apart into what was thought and what was answered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.text import TextStream

ASKED = [{"role": "user", "content": "1+1=?"}]


def streamed(chat: ChatFormat, ids: list[int], sizes: list[int], *, thinking=None, **params) -> tuple[str, str]:
    """(reasoning, content) of a reply that comes in pieces of these sizes, the last one repeated."""
    prompt = chat.encode(ASKED, thinking=thinking)
    splitter = chat.splitter(prompt, thinking=thinking)
    stream = TextStream(chat.tokenizer, SamplingParams(**params), prompt)
    reasoning = content = ""
    at, stop = 0, None
    while at < len(ids) and stop is None:
        taken = ids[at : at + sizes.pop(0) if len(sizes) > 1 else at + sizes[0]]
        text, counted, stop = stream.add(taken)
        piece = splitter.add(text, taken[:counted])
        reasoning, content = reasoning + piece.reasoning, content + piece.content
        at += len(taken)
    piece = splitter.add(stream.end(), [])
    return reasoning + piece.reasoning, content + piece.content


def written(chat: ChatFormat, *parts: str) -> list[int]:
    """Ids of texts and, where a part is one, of marks."""
    ids: list[int] = []
    for part in parts:
        mark = chat.tokenizer.id_of(part)
        ids += chat.tokenizer.encode(part).tolist() if mark is None else [mark]
    return ids


@pytest.mark.parametrize(
    ("name", "thinking", "parts", "expected"),
    [
        ("r1", None, ["hm", "</think>", "\n\n2"], ("hm", "\n\n2")),
        ("r1", None, ["<think>", "hm", "</think>", "2"], ("hm", "2")),
        ("r1", None, ["hm, not done"], ("hm, not done", "")),
        ("r1", None, ["</think>", "2"], ("", "2")),
        ("v3", None, ["<think>", "\nhm\n", "</think>", "2"], ("\nhm\n", "2")),
        ("v3", None, ["2", "<think>", "hm", "</think>"], ("", "2<think>hm</think>")),
        ("v3", None, ["2"], ("", "2")),
        ("v3.1", True, ["hm", "</think>", "2", "</think>", "3"], ("hm", "2</think>3")),
        ("v3.1", False, ["2"], ("", "2")),
        ("v3.1", False, ["<｜end▁of▁sentence｜>"], ("", "")),
        ("plain", None, ["2"], ("", "2")),
    ],
)
@pytest.mark.parametrize("sizes", [[1], [2], [100]])
def test_the_closing_mark_parts_reasoning_from_content(released_tokenizer, name, thinking, parts, expected, sizes):
    chat = ChatFormat(name, released_tokenizer)
    assert streamed(chat, written(chat, *parts), [*sizes], thinking=thinking) == expected


def test_a_mark_that_is_written_as_text_parts_nothing(released_tokenizer):
    chat = ChatFormat("r1", released_tokenizer)
    ids = [*released_tokenizer.encode("a</think>b").tolist(), *written(chat, "</think>", "c")]
    assert streamed(chat, ids, [1]) == ("a</think>b", "c")


def test_stop_strings_end_either_part(released_tokenizer):
    chat = ChatFormat("r1", released_tokenizer)
    ids = written(chat, "one two", "</think>", "three four")
    assert streamed(chat, ids, [1], stop=["two"]) == ("one ", "")
    assert streamed(chat, ids, [1], stop=["e f"]) == ("one two", "thre")
    assert streamed(chat, ids, [1], stop=["think>th"]) == ("one two", "")
    assert streamed(chat, ids, [1], stop=["think>th"], include_stop_str_in_output=True) == ("one two", "th")


@settings(max_examples=100)
@given(data=st.data())
def test_the_parts_do_not_depend_on_how_the_reply_comes(released_tokenizer, data):
    chat = ChatFormat(data.draw(st.sampled_from(["r1", "v3"])), released_tokenizer)
    parts = st.sampled_from(["<think>", "</think>", "a", "</", "think>", " 日本", "🎉🎉"])
    ids = written(chat, *data.draw(st.lists(parts, max_size=10)))
    cut = data.draw(st.lists(st.sampled_from(released_tokenizer.encode("🎉").tolist()), max_size=3))
    ids = [*ids[: data.draw(st.integers(0, len(ids)))], *cut, *ids]
    stop = data.draw(st.lists(st.sampled_from(["a<", "k>a", "</t", "日"]), max_size=2))
    whole = streamed(chat, ids, [1000], stop=stop)
    assert streamed(chat, ids, data.draw(st.lists(st.integers(1, 4), min_size=1)), stop=stop) == whole
