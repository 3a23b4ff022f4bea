"""Array aliases, with the legend of the dimension letters used in every signature.

| letter | axis                       | letter | axis                                  |
|--------|----------------------------|--------|---------------------------------------|
| B      | batch                      | H      | attention heads                       |
| T      | query positions            | Q      | query latent (q_lora_rank)            |
| S      | cached or key positions    | C      | key/value latent (kv_lora_rank)       |
| N      | tokens, B·T                | I      | head dim without rope (qk_nope)       |
| D      | model width                | R      | head dim with rope (qk_rope)          |
| F      | feed-forward width         | J      | head dim of queries and keys, I + R   |
| F2     | gate and up together, 2·F  | W      | head dim of values                    |
| V      | vocabulary                 | E      | experts                               |
| L      | layers                     | G      | groups of experts (nodes)             |
| K      | experts chosen per token   | M      | rows after dispatch                   |
| A      | input of a projection      | P      | pages; peers; ranks of a pipeline     |
| Z      | output of a projection     | X      | a joined or packed row                |
| l      | MoE layers                 | Y      | scales of a row                       |
| k      | MTP modules                | d      | main model and MTP modules, k + 1     |
| c      | positions of a chunk       |        | otherwise lower case: a device's part |

A suffix is spelled out: `M_blocks` is a number of blocks of M, `T_plus_1` is T + 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt

AnyArray = Array | np.ndarray
"""What the public functions take: arrays of jax or of numpy."""

Params = Mapping[str, Any]
"""Nested dict of arrays: one subtree of the parameter tree."""

Variables = Mapping[str, Any]
"""`{"params": ..., "router_state": ...}`: everything `forward` reads."""

DType = jax.typing.DTypeLike

__all__ = ["AnyArray", "Array", "Bool", "DType", "Float", "Int", "Key", "PRNGKeyArray", "Params", "UInt", "Variables"]
