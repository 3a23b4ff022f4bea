"""The training bench: its figures belong together, its errors are clear, and ratios pair rounds."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dsv3_jax.bench.peer_client import Peer
from dsv3_jax.bench.timing import median_ratio, summary, take_turns
from dsv3_jax.bench.train import main, random_batch
from dsv3_jax.config.check import UserError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig

SMALL = [
    f"--set=model.{key}={value}"
    for key, value in {
        "vocab_size": 64,
        "model_dim": 32,
        "num_layers": 2,
        "ffn_dim": 32,
        "moe.expert_dim": 8,
        "mla.q_latent_dim": 16,
        "mla.kv_latent_dim": 16,
        "mla.nope_head_dim": 8,
        "mla.rope_head_dim": 4,
        "mla.v_head_dim": 8,
    }.items()
] + ["--set=train.seq_len=32"]

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_programs_take_turns():
    order = []

    def program(name):
        return lambda: order.append(name) or float(len(order))

    seconds = take_turns({"a": program("a"), "b": program("b")}, rounds=3)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert summary(seconds["b"]) == {"median_s": 4, "min_s": 2, "max_s": 6}
    assert median_ratio(seconds["b"], seconds["a"]) == pytest.approx(4 / 3)


@pytest.mark.slow
def test_json_is_one_object_whose_numbers_agree(repository: Path, capsys: pytest.CaptureFixture[str]):
    """Of what `make gpu` trains, but small, and in float32: the measured rate of bfloat16 takes a CPU half a minute."""
    settings = re.search(r"^GPU_LAYERS := (.*)$", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert settings is not None
    config = [str(repository / "configs" / "v2_lite_16b.py"), *(f"--set={each}" for each in settings[1].split())]
    small = [*SMALL, "--set", "model.mla.num_heads=2", "model.moe.num_experts=8", "model.moe.top_k=2", "model.bos_id=0"]
    small += ["model.eos_id=1", "train.batch.micro=4", "precision=float32"]
    assert main([*config, *small, "--rounds=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_s"] == pytest.approx(4 * 32 / found["median_s"])
    assert 0 < found["mfu"] < 1
    assert found["mfu"] == pytest.approx(
        found["tokens_per_s"] * found["flops_per_token"] / found["matmul_gflops"] / 1e9
    )
    assert found["peak_memory_gib"] > 0.05
    assert found["steps"] == 2 + 1 + 2  # compiled and warmed, a round in turns, the rounds
    assert found["losses"][1] < found["losses"][0]
    assert {"jax", "python"} <= set(found["versions"])
    assert "peer" not in found


def test_labels_are_the_next_tokens(repository: Path):
    cfg = load_config(repository / "configs" / "bench_30m.py")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mtp_depth=1))
    batch = random_batch(cfg)
    assert batch.tokens.shape == (4, 512)
    for depth in range(2):
        assert (batch.labels[depth, :, : 511 - depth] == batch.tokens[:, depth + 1 :]).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.py"], "missing.py"),
        (["--rounds=0"], "--rounds 0"),
        (["--set=model.num_layer=3"], "num_layers"),
        ([*SMALL, "--rounds=1", "--experts=15"], "num_experts=15"),
    ],
)
def test_errors_are_clear(arguments, said, repository: Path, capsys: pytest.CaptureFixture[str]):
    if arguments[0].startswith("--"):
        arguments = [str(repository / "configs" / "bench_30m.py"), *arguments]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_a_python_without_the_peer_is_refused(python: str):
    with pytest.raises(UserError, match="--peer"):
        Peer(python, ModelConfig(), batch=1, seq_len=8, threads=1)
