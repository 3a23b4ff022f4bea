"""Text of a completion as its tokens come, against text decoded whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.text import Detokenizer, TextStream

TEXTS = ["abba abab aab", "größe €uro naïve 日本語 🎉🎉", "def f(x):\n    return x\n"]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train(iter(TEXTS * 20), vocab_size=330)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer that knows no more than bytes."""
    return tokenizers.train(iter(TEXTS), vocab_size=256 + len(tokenizers.SPECIAL_TOKENS))


def cut(text: str) -> str:
    return text.removesuffix("\ufffd")


def check_prefixes(tokenizer, prompt: list[int], ids: list[int]) -> None:
    """After each token all whole characters are out, at the end all that decoding at once gives."""
    before = tokenizer.decode(prompt, skip_special=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special=True)
    if not whole.startswith(before):
        before = cut(before)  # a character that the prompt cut is given whole
    stream, written = Detokenizer(tokenizer, prompt), ""
    for count, token in enumerate(ids, 1):
        written += stream.add(token)
        so_far = tokenizer.decode([*prompt, *ids[:count]], skip_special=True)
        assert whole.startswith(before + written)
        assert before + written == before or len(before + written) >= len(cut(so_far))
    assert before + written + stream.end() == whole


@settings(max_examples=100)
@given(data=st.data())
def test_pieces_of_random_ids_are_the_text_of_all(trained, data):
    ids = st.lists(st.integers(0, trained.num_tokens + 20), max_size=50)
    check_prefixes(trained, data.draw(ids), data.draw(ids))


@settings(max_examples=50)
@given(data=st.data(), text=st.text(max_size=30))
def test_pieces_are_the_text_with_the_released_tokenizer(released_tokenizer, data, text):
    random = data.draw(st.lists(st.integers(0, 129_000), max_size=20))
    ids = [*released_tokenizer.encode(text).tolist(), *random]
    at = data.draw(st.integers(0, len(ids)))
    check_prefixes(released_tokenizer, ids[:at], ids[at:])


@settings(max_examples=50)
@given(text=st.text(alphabet="aé€🎉\ufffd \n", min_size=1, max_size=60), at=st.integers(0, 200))
def test_characters_come_whole_wherever_tokens_cut_them(bytewise, text, at):
    ids = bytewise.encode(text).tolist()
    check_prefixes(bytewise, ids[:at], ids[at:])
    stream = Detokenizer(bytewise, [])
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.end() == text
    assert all(piece in text for piece in pieces)


def test_bytes_that_are_no_text_are_not_held_for_ever(bytewise):
    stream = Detokenizer(bytewise, bytewise.prompt("x"))
    _, stray = bytewise.encode("À").tolist()
    pieces = [stream.add(stray) for _ in range(300)]
    assert pieces == ["", *["\ufffd"] * 299]
    assert stream.end() == "\ufffd"


def test_marks_and_ids_without_a_token_add_nothing(trained):
    stream = TextStream(trained, SamplingParams(), trained.prompt("a"))
    assert stream.add([trained.bos_id, trained.eos_id, trained.pad_id, trained.num_tokens + 7]).text == ""
    assert stream.add(trained.encode(" b").tolist()).text == " b"


# Stop strings


def stopped(pieces: list[str], params: SamplingParams) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string of tokens with these texts, a character at a time."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        for character in piece:
            text += character
            found = [stop for stop in params.stop if text.endswith(stop)]
            if found and count > params.min_tokens:
                stop = max(found, key=len)
                return text if params.include_stop_str_in_output else text[: -len(stop)], count, stop
    return text, len(pieces), None


@settings(max_examples=200)
@given(data=st.data())
def test_the_stop_string_that_is_complete_first_ends_the_text(trained, data):
    words = [trained.encode(word).tolist() for word in ("a", "b", "abba", " abab", " aab", "🎉")]
    ids = [token for word in data.draw(st.lists(st.sampled_from(words), max_size=12)) for token in word]
    params = SamplingParams(
        stop=data.draw(st.lists(st.text("ab 🎉", min_size=1, max_size=5), max_size=4)),
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 3])),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    detokenizer, stream = Detokenizer(trained, []), TextStream(trained, params, [])
    expected = stopped([detokenizer.add(token) for token in ids], params)
    text, taken, stop = "", 0, None
    while taken < len(ids) and stop is None:
        size = data.draw(st.integers(1, 3))
        piece = stream.add(ids[taken : taken + size])
        text, taken, stop = text + piece.text, taken + piece.num_tokens, piece.stop
        assert expected[0].startswith(text)
    assert (text + stream.end(), taken, stop) == expected


def test_text_that_may_become_a_stop_string_waits(trained):
    stream = TextStream(trained, SamplingParams(stop="aab"), [])
    pieces = [stream.add(trained.encode(letter).tolist()).text for letter in "baac"]
    assert pieces == ["b", "", "", "aac"]
    assert stream.add(trained.encode("a").tolist()).text == ""
    assert stream.end() == "a"


def test_a_stop_string_in_the_prompt_does_not_count(trained):
    stream = TextStream(trained, SamplingParams(stop="ab"), trained.encode("ab a").tolist())
    assert stream.add(trained.encode("b").tolist()) == ("b", 1, None)
