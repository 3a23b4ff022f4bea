"""Small models for the tests of checkpoints, and a run dir that holds some."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from dsv3_jax.config.load import load_config, to_dict
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.hf_names import flatten, unflatten
from dsv3_jax.model.params import abstract_params
from dsv3_jax.training.checkpoint import CheckpointFolder
from dsv3_jax.training.state import TrainState
from tests.small import make_config


@pytest.fixture
def small() -> ModelConfig:
    """The shared small model, ragged against blocks of 128: two dense layers, two of experts, one MTP module."""
    return make_config(
        vocab_size=96, model_dim=136, num_layers=4, num_dense_layers=2, ffn_dim=160, max_position=512, yarn=None
    )


@pytest.fixture
def random_variables():
    """cfg -> variables with random values everywhere, biases and norms too."""

    def make(cfg: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)
        specs = flatten(abstract_params(cfg, dtype))
        return unflatten(
            {path: jnp.asarray(rng.normal(size=spec.shape), spec.dtype) for path, spec in sorted(specs.items())}
        )

    return make


@pytest.fixture
def save_checkpoint(repository):
    """Saves variables, and their moving average, as a run of `cfg` does."""
    tiny = load_config(repository / "configs" / "tiny.py")

    def save(run_dir: Path, step: int, cfg: ModelConfig, variables: dict, average: dict | None, **host) -> None:
        train = dataclasses.replace(tiny.train, seq_len=cfg.max_position)
        config = to_dict(dataclasses.replace(tiny, model=cfg, train=train, precision="float32"))
        state = TrainState(variables["params"], variables["router_state"], {})
        folder = CheckpointFolder(run_dir / "checkpoints", keep=5)
        folder.save(step, state, average, {"config": config, **host})
        folder.wait()

    return save


@pytest.fixture
def run_dir(tmp_path, small, random_variables, save_checkpoint) -> Path:
    """Two checkpoints with moving averages, and a tokenizer."""
    for step in (1, 2):
        average = jax.tree.map(np.asarray, random_variables(small, seed=10 + step)["params"])
        save_checkpoint(tmp_path / "run", step, small, random_variables(small, seed=step), average)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<bos>", "<eos>"], show_progress=False)
    inner.train_from_iterator(["return x"], trainer)
    inner.save(str(tmp_path / "run" / "tokenizer.json"))
    return tmp_path / "run"


@pytest.fixture
def damage_newest():
    """Cuts a byte off the largest file of the run's second checkpoint."""

    def damage(run_dir: Path) -> None:
        files = (run_dir / "checkpoints" / f"{2:012d}" / "params").rglob("*")
        file = max(files, key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])

    return damage


@pytest.fixture
def copy_of_golden(golden, tmp_path):
    """name -> a copy of a golden checkpoint that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(golden / "hf" / name, tmp_path / name))

    return copy


@pytest.fixture
def assert_same_bits():
    """Fails unless two trees have the same leaves, dtypes and bits."""

    def check(left: dict, right: dict) -> None:
        left_flat, right_flat = flatten(left), flatten(right)
        assert left_flat.keys() == right_flat.keys()
        for path, leaf in left_flat.items():
            a, b = np.asarray(leaf), np.asarray(right_flat[path])
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=path)

    return check


@pytest.fixture
def without_mtp():
    """(cfg, variables) without their MTP modules."""

    def drop(cfg: ModelConfig, variables: dict) -> tuple[ModelConfig, dict]:
        kept = {path: leaf for path, leaf in flatten(variables).items() if "/mtp/" not in path}
        return dataclasses.replace(cfg, mtp_depth=0), unflatten(kept)

    return drop


@pytest.fixture
def devices() -> list:
    """The eight CPU devices of the tests."""
    return jax.devices()
