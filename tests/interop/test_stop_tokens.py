"""What ends generation: the union of what two files declare."""

import json
import math

import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.stop_tokens import stop_ids


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (1, None, (1,)),
        (1, 1, (1,)),
        ([1, 7], [9, 1], (1, 7, 9)),
        ([1], [163, 7.0], (1, 163, 7)),
        (None, 5, (1, 5)),
        (None, None, (1,)),
    ],
)
def test_all_ids_that_either_file_declares(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_ids(tmp_path, ModelConfig(eos_id=1)) == expected


def test_either_file_may_be_absent(tmp_path):
    assert stop_ids(tmp_path, ModelConfig(eos_id=3)) == (3,)
    assert stop_ids(tmp_path, ModelConfig(eos_id=None)) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"generation_config.json: is not JSON"),
        ("[1]", r"generation_config.json: must be a JSON object"),
        *(
            (json.dumps({"eos_token_id": value}), rf"generation_config.json: eos_token_id={shown}")
            for value, shown in [
                ([], r"\[\] names no token"),
                ([1, -1], "-1 is outside"),
                (129280, "129280 is outside"),
                (True, "True must be"),
                ("1", "'1' must be"),
                (math.nan, "nan must be"),
                ({"id": 1}, "{'id': 1} must be"),
            ]
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        stop_ids(tmp_path, ModelConfig())
