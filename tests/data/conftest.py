"""A small tokenizer and a small corpus shared by the tests of the data folder."""

import dataclasses
from pathlib import Path

import pytest

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.build_folder import prepare
from dsv3_jax.data.folder import PreparedData

SENTENCE = "def add(a, b):\n    return a + b  # Grüße, 世界 {n}\n\n\nclass Point{n}:\n    x: int = {n}\n"


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    return dataclasses.replace(ModelConfig(), vocab_size=400)


@pytest.fixture(scope="session")
def small_tokenizer() -> tokenizer.TextTokenizer:
    return tokenizer.train((SENTENCE.format(n=n) for n in range(200)), vocab_size=400)


@pytest.fixture(scope="session")
def folder_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of one to sixty sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(60):
        (folder / f"{n:02d}.py").write_text(
            "".join(SENTENCE.format(n=n * k) for k in range(1, n + 2)), encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="session")
def cfg(folder_of_text: Path) -> DataConfig:
    return DataConfig(paths=(str(folder_of_text),), heldout_fraction=0.2, fim_rate=0.5)


@pytest.fixture(scope="session")
def prepared(cfg: DataConfig, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(cfg, model, tmp_path_factory.mktemp("run"), log=lambda line: None)
