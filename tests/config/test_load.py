import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.load import diff, fields_of, flatten, from_dict, load_config, override, to_dict
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import (
    AuxiliaryConfig,
    BatchConfig,
    LearningRateConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)

CONFIGS = ("tiny", "bench_30m", "v2_lite_16b", "dsv3_671b")

TINY = load_config(Path(__file__).parents[2] / "configs" / "tiny.py")
NUMBER = r"\A-?[0-9_]{1,20}(\.[0-9]{0,3})?(e-?[0-9]{1,3})?\Z|\A(nan|inf|none|default|true|\[\]|\[1\])\Z"


@pytest.fixture(scope="module")
def tiny() -> RunConfig:
    return TINY


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_survives_json(repository: Path, name: str):
    cfg = load_config(repository / "configs" / f"{name}.py")
    assert cfg.name == name
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_names_purpose_command_and_result(repository: Path, name: str):
    text = (repository / "configs" / f"{name}.py").read_text()
    assert f"configs/{name}.py" in text
    assert "Expected" in text


def test_every_key_of_a_full_config_can_be_set(repository: Path):
    full = load_config(repository / "configs" / "dsv3_671b.py")
    known = fields_of()
    for key, value in flatten(to_dict(full)).items():
        if value in ([], None):
            continue
        text = ",".join(value) if isinstance(value, list) else str(value)
        assert override(full, [f"{key}={text}"]) == full, key
        assert key in known


def test_values_are_read_by_the_type_of_their_field(tiny: RunConfig):
    changed = override(
        tiny,
        [
            "train.total_tokens=4e6",
            "train.lr.peak=1",
            "train.output.tensorboard=false",
            "data.paths=a.txt, b/*.py",
            "precision=mixed",
            "model.mla.q_latent_dim=none",
            "model.yarn=default",
            "model.yarn.factor=4",
        ],
    )
    assert changed.train.total_tokens == 4_000_000
    assert isinstance(changed.train.total_tokens, int)
    assert isinstance(changed.train.lr.peak, float)
    assert changed.train.output.tensorboard is False
    assert changed.data.paths == ("a.txt", "b/*.py")
    assert changed.model.mla.q_latent_dim is None
    assert changed.model.yarn is not None
    assert changed.model.yarn.factor == 4.0


def test_fields_that_belong_together_change_together(tiny: RunConfig):
    changed = override(tiny, ["model.moe.num_groups=5", "model.moe.num_experts=20", "model.moe.groups_per_token=5"])
    assert changed.model.moe.num_experts == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr.peek=1e-3", "did you mean 'train.lr.peak'"),
        ("lr=1", "unknown key"),
        ("peak=1e-3", "did you mean 'train.lr.peak'"),
        ("model.num_layer=3", "did you mean 'model.num_layers'"),
        ("train.lr=3", "names a group"),
        ("train.lr.peak", "not of the form"),
        ("train.lr.peak=fast", "not a number"),
        ("train.total_tokens=1.5", "not a whole number"),
        ("train.total_tokens=nan", "not a whole number"),
        ("train.output.tensorboard=yes", "not true or false"),
        ("precision=fp8", "not one of float32, bfloat16, mixed"),
        ("model.yarn.factor=4", "model.yarn is none"),
        ("model.num_dense_layers=99", "num_dense_layers=99"),
        ("model.moe.num_experts=17", "not divisible"),
        ("train.batch.full=13", "whole micro-batches"),
        ("data.paths=[1]", "not text"),
        ("data.paths=", "an item is empty"),
        ("data.paths= , ", "an item is empty"),
        ("data.paths=a,,b", "an item is empty"),
        ('data.paths=["a", " "]', "non-empty strings"),
        ("data.paths=" + "[" * 100_000, "not a JSON list"),
        ("data.tokenizer= ", "tokenizer='' is empty"),
        ("data.cache_dir=", "cache_dir='' is empty"),
        ("data.text_field= ", "names no field"),
        ("name=", "name='' cannot be printed"),
        ("name=a\nb", r"name='a\\nb' cannot be printed"),
        ("train.seq_len=1025", r"seq_len=1025 exceeds model\.max_position=1024"),
        ("model.eos_id=none", r"model\.eos_id is none, but training ends each text with a token"),
        ("model.max_position=255", r"seq_len=256 exceeds model\.max_position=255"),
        ("train.batch.micro=0", "micro=0 must be positive"),
        ("train.lr.peak=inf", r"peak=inf is not finite.*LearningRateConfig\.peak"),
        ("train.lr.peak=1e999", "peak=inf is not finite"),
        ("train.optimizer.weight_decay=inf", "weight_decay=inf is not finite"),
        ("train.optimizer.clip_norm=nan", "clip_norm=nan is not finite"),
        ("train.auxiliary.balance_weight=nan", "balance_weight=nan is not finite"),
        ("data.fim_rate=-inf", "fim_rate=-inf is not finite"),
        ("train.seq_len=inf", "not a whole number"),
        (f"train.total_tokens={10**400}", "more than 64 bits"),
        (f"train.total_tokens={'9' * 5000}", "not a whole number"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_reason(tiny: RunConfig, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        override(tiny, [text])


def test_a_number_field_takes_finite_numbers_only():
    wrong = {int: (True, 10**400), float: (True, 10**400, math.nan, -math.inf)}
    groups = (DataConfig, LearningRateConfig, BatchConfig, OptimizerConfig, AuxiliaryConfig, OutputConfig, TrainConfig)
    for cls in groups:
        for field in dataclasses.fields(cls):
            for value in wrong.get(field.type, ()):
                with pytest.raises(ConfigError, match=rf"{field.name}.*{cls.__name__}\.{field.name}"):
                    cls(**{field.name: value})


@given(
    st.lists(st.tuples(st.sampled_from(sorted(fields_of())), st.one_of(st.text(), st.from_regex(NUMBER))), max_size=3)
)
def test_whatever_is_set_is_refused_with_a_sentence_or_survives_json(changes: list[tuple[str, str]]):
    cfg = None
    with contextlib.suppress(ConfigError):
        cfg = override(TINY, [f"{key}={value}" for key, value in changes])
    if cfg is not None:
        assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_a_file_that_is_no_config_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "wrong.py").write_text("def get_config(): return 3")
    with pytest.raises(ConfigError, match="returned int"):
        load_config(tmp_path / "wrong.py")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "empty.py" / "below")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"def get_config(:", r"line 1: SyntaxError: invalid syntax$"),
        (b"x = '\xe9'", "line 1: SyntaxError"),
        (b"x = 1\0", "null bytes"),
        (b"import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'$"),
        (b"raise SystemExit(3)", "line 1: SystemExit: 3"),
        (b"def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero$"),
        (b"def get_config(size):\n    pass", r"TypeError: get_config\(\) missing 1 required"),
        (b"get_config = 3", "TypeError: 'int' object is not callable"),
        (
            b"from dsv3_jax.config.train import *\n\ndef get_config():\n  return TrainConfig(\n    seq_len=0)",
            "line 4: seq_len=0",
        ),
        (b"(" * 100_000, "line 1"),
    ],
)
def test_what_a_config_file_raises_is_one_line_with_its_place(tmp_path: Path, source: bytes, message: str):
    path = tmp_path / "mine.py"
    path.write_bytes(source)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"config file {path}")
    assert "\n" not in str(raised.value)


def test_a_config_file_is_read_as_it_is_and_left_alone(tmp_path: Path, tiny: RunConfig, repository: Path):
    """Written twice within a second, with the same size: a compiled copy beside it would be taken for the new one."""
    path = tmp_path / "mine.py"
    source = (repository / "configs" / "tiny.py").read_text()
    path.write_text(source)
    assert load_config(path) == tiny
    path.write_text(source.replace("peak=4e-3", "peak=5e-3"))
    assert load_config(path).train.lr.peak == 5e-3
    assert [item.name for item in tmp_path.iterdir()] == ["mine.py"]


def test_json_of_another_version_is_refused_with_the_key(tiny: RunConfig):
    tree = to_dict(tiny)
    del tree["train"]["seq_len"]
    with pytest.raises(ConfigError, match=r"'train\.seq_len' is missing"):
        from_dict(tree)
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        from_dict({**to_dict(tiny), "colour": 1})


def test_diff_lists_what_changed_and_nothing_else(tiny: RunConfig):
    new = override(tiny, ["train.lr.peak=0.5", "model.yarn=default"])
    found = diff(to_dict(tiny), to_dict(new))
    keys = {difference.key for difference in found}
    assert "train.lr.peak" in keys
    assert all(key == "train.lr.peak" or key.startswith("model.yarn") for key in keys)
    assert diff(to_dict(tiny), to_dict(tiny)) == []
    assert "-> 0.5" in next(str(difference) for difference in found if difference.key == "train.lr.peak")


@given(st.integers(min_value=1, max_value=10**16))
def test_token_counts_stay_exact(tokens: int):
    cfg = TrainConfig(total_tokens=tokens)
    assert from_dict(to_dict(cfg), TrainConfig).total_tokens == tokens


def test_a_field_that_is_no_more_is_passed_over_aloud(repository, capsys) -> None:
    config = repository / "configs" / "tiny.py"
    assert load_config(config, ["data.shuffle_rows=8"]) == load_config(config)
    assert "data.shuffle_rows has no effect any more: all rows of an epoch are shuffled" in capsys.readouterr().err
