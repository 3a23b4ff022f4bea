"""Activations saved for the backward pass: what has a name is what the model holds."""

import collections
from pathlib import Path

import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.model.functions import functions_for
from dsv3_jax.planning.memory import Tensor, allocated_a_layer, main, traced

MIXED = functions_for("mixed")
FP8 = functions_for("fp8_dsv3")

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = load_config(CONFIGS / "tiny.py").model


@pytest.mark.parametrize("functions", [MIXED, FP8], ids=lambda functions: functions.name)
@pytest.mark.parametrize("is_moe", [False, True], ids=["dense", "moe"])
def test_names_account_for_every_tensor_of_the_backward_pass(functions, is_moe):
    layer = traced(TINY, functions, rows=3, seq_len=50, is_moe=is_moe)
    assert layer.is_accounted_for
    assert layer.size_of() == sum(tensor.size * count for tensor, count in layer.held.items())
    assert layer.size_of("mla_added") == 3 * 50 * TINY.model_dim * 2
    gate_up = 2 * (TINY.moe.expert_dim * TINY.moe.num_shared_experts if is_moe else TINY.ffn_dim)
    assert layer.size_of("ffn_gate_up") == 150 * (
        gate_up * 2 if functions is MIXED else gate_up + 4 * -(-gate_up // 128)
    )


def test_nothing_of_a_layer_but_its_input_is_saved_by_full_rematerialisation():
    held = traced(TINY, FP8, rows=2, seq_len=40, is_moe=True, remat="full").held
    assert held == collections.Counter({Tensor((2, 40, TINY.model_dim), "bfloat16"): 1})


def test_the_table_of_the_released_model(capsys):
    assert main([str(CONFIGS / "dsv3_671b.py"), "--rows", "8"]) == 0
    printed = capsys.readouterr().out
    rows = {}
    for line in printed.split("MoE layers")[1].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[1][0].isdigit():
            rows[cells[0]] = float(cells[3])
    assert rows["ffn_gate_up"] == pytest.approx(2 / (1 + 4 / 128), abs=0.01)
    assert rows["mla_attended"] == pytest.approx(2 / (1.5 + 4 / 128), abs=0.01)
    assert rows["mla_added"] == rows["mla_kv_down"] == rows["router_logits"] == 1
    assert rows["experts_gate_up"] > 1.7  # blocks of 128 rows are padded more than blocks of 64
    assert 1.35 < rows["total"] < 1.6
    assert main([str(CONFIGS / "tiny.py"), "--rows", "0"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("functions", [MIXED, FP8], ids=lambda functions: functions.name)
def test_xla_allocates_for_a_layer_what_the_names_say(functions):
    """To 64 bytes, which is what XLA aligns a buffer to."""
    named = traced(TINY, functions, rows=8, seq_len=256, is_moe=True).size_of()
    assert abs(allocated_a_layer(TINY, functions, rows=8, seq_len=256) - named) <= 64
