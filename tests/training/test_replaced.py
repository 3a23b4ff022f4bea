"""A configuration file may replace functions; a run knows which, and is continued with no others."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.moe.router import route
from dsv3_jax.training.replaced import functions_in, replaced

FILE = """
import dataclasses
import jax.numpy as jnp
import dsv3_jax as ds
from dsv3_jax.model.moe.router import route


def equal_route(logits, bias, **settings):
    weights, ids = route(logits, bias, **settings)
    return jnp.full_like(weights, settings["scale"] / settings["top_k"]), ids


def get_functions(cfg):
    return dataclasses.replace(ds.functions_for(cfg.precision), route=equal_route)
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    return file


def test_a_file_without_functions_has_those_of_its_precision(tmp_path: Path, small: RunConfig) -> None:
    assert functions_in(written(tmp_path, ""), small) is functions_for("float32")
    assert replaced(functions_for("float32"), "float32") == {}


def test_a_file_replaces_a_function_and_the_run_names_it(tmp_path: Path, small: RunConfig) -> None:
    functions = functions_in(written(tmp_path, FILE), small)
    weights, ids = functions.route(jnp.zeros((2, 4)), None, num_groups=1, groups_per_token=1, top_k=2, scale=3.0)
    assert weights.tolist() == [[1.5, 1.5]] * 2
    assert ids.shape == (2, 2)
    assert functions == dataclasses.replace(functions_for("float32"), route=functions.route)
    assert replaced(functions, "float32") == {"route": "equal_route"}
    assert replaced(dataclasses.replace(functions, route=route), "float32") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_functions(cfg):\n    return 3", r"mine.py returned int; it must return Functions"),
        (
            "import dsv3_jax as ds\ndef get_functions(cfg):\n    return ds.functions_for('bfloat16')",
            "parameters of another dtype than precision='float32' has",
        ),
        ("def get_functions(cfg):\n    return cfg.nothing", "mine.py, line 2: AttributeError"),
    ],
)
def test_what_is_not_functions_is_refused(tmp_path: Path, small: RunConfig, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        functions_in(written(tmp_path, text), small)
