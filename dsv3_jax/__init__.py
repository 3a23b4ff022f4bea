"""DeepSeek-V3 in JAX and Flax: the public names. Importing this runs nothing; each name loads when first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_jax.config.load import load_config
    from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
    from dsv3_jax.config.serving import ServingConfig
    from dsv3_jax.flax import MLA, DeepSeekV3, MoE
    from dsv3_jax.interop.load import load_pretrained
    from dsv3_jax.interop.run_dir import load
    from dsv3_jax.interop.save import save_pretrained
    from dsv3_jax.model.functions import Functions, functions_for
    from dsv3_jax.model.params import abstract_params, init
    from dsv3_jax.model.transformer import forward
    from dsv3_jax.serving.engine import Engine
    from dsv3_jax.serving.generate import generate
    from dsv3_jax.serving.outputs import RequestOutput
    from dsv3_jax.serving.params import SamplingParams

__all__ = [
    "MLA",
    "DeepSeekV3",
    "Engine",
    "Functions",
    "MLAConfig",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "ServingConfig",
    "YarnConfig",
    "abstract_params",
    "forward",
    "functions_for",
    "generate",
    "init",
    "load",
    "load_config",
    "load_pretrained",
    "save_pretrained",
]

_HOME = {
    "DeepSeekV3": "dsv3_jax.flax",
    "Engine": "dsv3_jax.serving.engine",
    "MLA": "dsv3_jax.flax",
    "Functions": "dsv3_jax.model.functions",
    "MLAConfig": "dsv3_jax.config.model",
    "MoE": "dsv3_jax.flax",
    "MoEConfig": "dsv3_jax.config.model",
    "ModelConfig": "dsv3_jax.config.model",
    "RequestOutput": "dsv3_jax.serving.outputs",
    "SamplingParams": "dsv3_jax.serving.params",
    "ServingConfig": "dsv3_jax.config.serving",
    "YarnConfig": "dsv3_jax.config.model",
    "abstract_params": "dsv3_jax.model.params",
    "forward": "dsv3_jax.model.transformer",
    "functions_for": "dsv3_jax.model.functions",
    "generate": "dsv3_jax.serving.generate",
    "init": "dsv3_jax.model.params",
    "load": "dsv3_jax.interop.run_dir",
    "load_config": "dsv3_jax.config.load",
    "load_pretrained": "dsv3_jax.interop.load",
    "save_pretrained": "dsv3_jax.interop.save",
}


def __getattr__(name: str) -> object:
    """Loads a public name from the module it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
