"""Array aliases, with the legend of the dimension letters used in every signature.

| letter | axis                      | letter | axis                                  |
|--------|---------------------------|--------|---------------------------------------|
| B      | batch                     | H      | attention heads                       |
| T      | query positions           | Q      | query latent (q_lora_rank)            |
| S      | cached or key positions   | C      | key/value latent (kv_lora_rank)       |
| N      | tokens, B·T               | I      | head dim without rope (qk_nope)       |
| D      | model width               | R      | head dim with rope (qk_rope)          |
| F      | feed-forward width        | W      | value head dim                        |
| V      | vocabulary                | E      | experts                               |
| L      | layers                    | G      | groups of experts (nodes)             |
| K      | experts chosen per token  | M      | rows after dispatch                   |
| P      | pages                     |        | lower case: one device's shard        |
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

AnyArray = Array | np.ndarray
"""What the public functions take: arrays of jax or of numpy."""

Params = Mapping[str, Any]
"""Nested dict of arrays: one subtree of the parameter tree."""

Variables = Mapping[str, Any]
"""`{"params": ..., "router_state": ...}`: everything `forward` reads."""

DType = jax.typing.DTypeLike

__all__ = ["AnyArray", "Array", "Bool", "DType", "Float", "Int", "PRNGKeyArray", "Params", "UInt", "Variables"]
