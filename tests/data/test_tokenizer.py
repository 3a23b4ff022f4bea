import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from dsv3_jax.config.check import UserError
from dsv3_jax.data import tokenizer


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=200) | st.binary(max_size=100).map(lambda data: data.decode("utf-8", "replace")))
def test_any_text_comes_back_and_its_bytes_are_counted(small_tokenizer, text):
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert int(small_tokenizer.bytes_per_token[ids].sum()) == len(text.encode())


@pytest.fixture(
    scope="module",
    params=[{}, {"special": False}, {"special": False, "normalized": True}, {"special": False, "lstrip": True}],
    ids=lambda flags: ", ".join(flags) or "special",
)
def marked_tokenizer(small_tokenizer, tmp_path_factory, request):
    """The small tokenizer with its marks declared as others declare theirs, and two marks that have no role."""
    content = json.loads(small_tokenizer.to_json())
    last = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": last + i, "content": mark, "special": False}
        for i, mark in enumerate(("<｜User｜>", "[INST]", "        "))
    ]
    for token in content["added_tokens"]:
        token.update(request.param)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(json.dumps(content))
    return tokenizer.load(file)


@settings(deadline=None, max_examples=50)
@given(
    parts=st.lists(
        st.sampled_from([*tokenizer.SPECIAL_TOKENS, "<｜User｜>", "[INST]", "a", " ", "\n", "<|"]), max_size=7
    )
)
def test_marks_in_a_text_stay_text_whatever_they_are_called(marked_tokenizer, small_tokenizer, parts):
    text = "".join(parts)
    ids = marked_tokenizer.encode(text)
    assert ids.tolist() == small_tokenizer.encode(text).tolist()
    assert marked_tokenizer.decode(ids) == text
    assert int(marked_tokenizer.bytes_per_token[ids].sum()) == len(text.encode())


def test_roles_stand_for_no_bytes_and_added_blanks_for_theirs(marked_tokenizer):
    assert marked_tokenizer.bytes_per_token[:6].tolist() == [0] * 6
    [blanks] = marked_tokenizer.encode(" " * 8)
    assert marked_tokenizer.bytes_per_token[blanks] == 8


def test_what_a_file_asks_for_besides_is_not_done(small_tokenizer, tmp_path):
    content = json.loads(small_tokenizer.to_json())
    content["model"]["dropout"] = 0.5
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
        "pad_type_id": 0, "pad_token": "<|pad_token|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "def add(a, b):\n    return a + b\n"
    assert tokenizer.load(tmp_path).encode(text).tolist() == small_tokenizer.encode(text).tolist()


def test_roles_have_the_first_ids(small_tokenizer):
    assert (small_tokenizer.bos_id, small_tokenizer.eos_id, small_tokenizer.pad_id) == (0, 1, 2)
    assert (small_tokenizer.fim.begin, small_tokenizer.fim.hole, small_tokenizer.fim.end) == (3, 4, 5)
    assert small_tokenizer.bytes_per_token[:6].tolist() == [0] * 6
    assert small_tokenizer.num_tokens <= 400


def test_marks_can_be_left_out_of_a_text(small_tokenizer):
    ids = [0, *small_tokenizer.encode("def f"), 4, 1, 2]
    assert small_tokenizer.decode(ids, skip_special=True) == "def f"
    assert small_tokenizer.decode(ids) == "<|bos_token|>def f<|fim_hole|><|eos_token|><|pad_token|>"


def test_the_same_texts_give_the_same_tokenizer(small_tokenizer):
    texts = [f"def f{n}(x):\n    return x + {n}\n" for n in range(100)]
    first, second = (tokenizer.train(iter(texts), vocab_size=380).to_json() for _ in range(2))
    assert first == second


def test_many_texts_are_encoded_as_one_by_one(small_tokenizer):
    texts = ["", "a", "def f(x):\n    return x\n" * 5, "世界"]
    many = small_tokenizer.encode_many(texts)
    assert [ids.tolist() for ids in many] == [small_tokenizer.encode(text).tolist() for text in texts]


def test_saved_and_loaded_it_encodes_the_same(small_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(small_tokenizer.to_json(), encoding="utf-8")
    loaded = tokenizer.load(tmp_path)
    text = "def f(x):\n    return x <|eos_token|>\n"
    assert loaded.encode(text).tolist() == small_tokenizer.encode(text).tolist()
    assert loaded.to_json() == small_tokenizer.to_json()


def test_indentation_joins_the_line_break_but_leaves_the_last_blank_to_the_word(small_tokenizer):
    pieces = [small_tokenizer.decode([i]) for i in small_tokenizer.encode("def add(a, b):\n    return a + b")]
    assert "".join(pieces) == "def add(a, b):\n    return a + b"
    assert any(piece.endswith(":\n   ") for piece in pieces)
    assert " return" in pieces


def test_words_without_end_are_learnt_in_linear_time_and_encoded_whole():
    runs = [run * (200_000 // len(run)) + "\n" for run in ("a", "-", "0", " ", "界", "QUJD+/9z")]  # uncut: hours
    made = tokenizer.train(iter(["some words of text\n" * 20, *runs]), vocab_size=320)
    for text in runs:
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert len(ids) < len(text.encode()) / 2


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size=200 .* use 262 or more"):
        tokenizer.train(iter(["a"]), vocab_size=200)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"\xff{", "cannot be read as JSON"),
        (b"not json", "cannot be read as JSON"),
        (b'{"a": 1}', "is no tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer.load(file)


def test_bos_and_eos_must_exist(small_tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(small_tokenizer.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"no token 100000, the model's eos_id"):
        tokenizer.load(file, eos_id=100000)


def test_released_names_of_the_marks_are_known(tmp_path):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"])
    inner.add_special_tokens(["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"])
    inner.add_tokens(["<think>"])
    file = tmp_path / "tokenizer.json"
    inner.save(str(file))
    loaded = tokenizer.load(file)
    assert loaded.pad_id == 2
    assert (loaded.fim.begin, loaded.fim.hole, loaded.fim.end) == (4, 3, 5)
    assert loaded.bytes_per_token.tolist() == [0, 0, 0, 0, 0, 0, len("<think>")]
    assert json.loads(loaded.to_json())["added_tokens"][6]["content"] == "<think>"
