"""The released model's counts come out of shapes alone, and its parameter tree is fixed."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.params import abstract_params, init
from dsv3_jax.planning.params import PARTS, as_json, leaves, main, part_of, report, table, tree_lines
from tests.small import make_config

SMALL = make_config(mtp_depth=2)


def test_released_model_has_the_published_counts() -> None:
    counted = report(ModelConfig())
    assert counted.main == 671_026_419_200
    assert counted.mtp == 11_610_068_224
    assert round(counted.activated / 1e9, 2) == 37.55
    assert round(counted.activated_without_embedding / 1e9, 2) == 36.63
    assert counted.fp8_files.num_tensors == 91_991
    assert counted.fp8_files.num_elements == 684_531_386_000
    assert round(counted.fp8_files.num_bytes / 2**30, 1) == 641.3


def test_tree_of_the_released_model_is_the_golden_one(golden: Path) -> None:
    # After a change on purpose:
    # python -m dsv3_jax.planning.params configs/dsv3_671b.py --tree > tests/golden/param_tree_671b.txt
    assert "\n".join(tree_lines(ModelConfig())) + "\n" == (golden / "param_tree_671b.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        dataclasses.replace(SMALL, num_dense_layers=0),
        dataclasses.replace(SMALL, num_dense_layers=3),
        dataclasses.replace(SMALL, mtp_depth=0),
        dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, num_shared_experts=0, has_bias=False)),
        dataclasses.replace(SMALL, mla=dataclasses.replace(SMALL.mla, q_latent_dim=None)),
    ],
    ids=["small", "no-dense", "only-dense", "no-mtp", "no-shared-no-bias", "full-query"],
)
def test_counts_are_those_of_init(cfg: ModelConfig, key: jax.Array) -> None:
    counted = report(cfg)
    fresh = jax.eval_shape(lambda key: init(cfg, key), key)
    assert counted.main + counted.mtp == sum(leaf.size for leaf in jax.tree.leaves(fresh))
    used = {part.part: (part.activated, part.main) for part in counted.parts}
    for part, (activated, main_count) in used.items():
        assert activated == (main_count // 2 if part == "routed experts" else main_count)


def test_files_hold_each_parameter_once_and_copies_of_vocabulary() -> None:
    counted = report(SMALL)
    copies = SMALL.mtp_depth * 2 * SMALL.vocab_size * SMALL.model_dim
    assert counted.bfloat16_files.num_elements == counted.main + counted.mtp + copies
    biases = (SMALL.num_moe_layers + SMALL.mtp_depth) * SMALL.moe.num_experts
    assert counted.bfloat16_files.num_bytes == 2 * counted.bfloat16_files.num_elements + 2 * biases


def test_every_path_of_the_tree_has_a_part_and_others_are_refused() -> None:
    assert {part_of(path) for path, _ in _specs()} == set(PARTS)
    with pytest.raises(ValueError, match="params/novelty/w belongs to no part"):
        part_of("params/novelty/w")


def test_tree_lines_name_each_dimension() -> None:
    for line, (path, spec) in zip(tree_lines(SMALL), _specs(), strict=True):
        assert line.startswith(f"{path} [")
        assert len(spec.axes) == len(spec.shape)
        assert math.prod(spec.shape) > 0


def test_table_and_json_carry_the_same_totals() -> None:
    counted = report(SMALL)
    data = json.loads(json.dumps(as_json(counted)))
    assert data["main"] == sum(part["main"] for part in data["parts"])
    assert f"{data['main']:,}" in table("small", counted)
    assert data["fp8_files"]["num_tensors"] == counted.fp8_files.num_tensors


@pytest.mark.slow
def test_program_prints_the_released_model(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(repository / "configs" / "dsv3_671b.py")]) == 0
    text = capsys.readouterr().out
    for number in ("671,026,419,200", "11,610,068,224", "91,991"):
        assert number in text
    assert main([str(repository / "configs" / "dsv3_671b.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["main"] == 671_026_419_200


def test_program_names_what_the_user_can_mend(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(repository / "configs" / "missing.py")]) == 2
    assert "does not exist" in capsys.readouterr().err
    config = str(repository / "configs" / "dsv3_671b.py")
    assert main([config, "--set", "model.num_layer=3"]) == 2
    assert "model.num_layers" in capsys.readouterr().err


def _specs():
    return list(leaves(abstract_params(SMALL)))
