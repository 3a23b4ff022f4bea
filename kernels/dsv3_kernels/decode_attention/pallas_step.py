"""What the attention of a whole decoding step launches: the plan, then two kernels a layer."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.aot.case import BF16_MMA, AotCase
from dsv3_kernels.aot.hlo import KERNEL, launches
from dsv3_kernels.decode_attention.api import mla_decode, plan_decode
from dsv3_kernels.decode_attention.cases import SOFTMAX_SCALE, DecodeCase

DEPTH = 61
"""Layers of DeepSeek-V3."""

IN_LINE = DecodeCase(128, 1, 16, 4096, is_fp8=True)
SCANNED = DecodeCase(128, 2, 128, 4096)

LOOP = Counter({"fusion": 4, "copy": 2})
"""What XLA adds for a loop of layers that have an addition each, and what there is without any kernel: the addition,
the counter and its comparison, and three buffers that the loop begins with."""


def layers_in_line(*inputs: Array, num_layers: int) -> tuple[Array, list[Array]]:
    """Attention by layers that pass their outputs on as queries; returns the lse of each."""
    x, *rest = inputs
    attend, lses = _attention(*inputs), []
    for _ in range(num_layers):
        x, lse = attend(x, *rest)
        lses.append(lse)
    return x, lses


def layers_scanned(*inputs: Array) -> tuple[Array, Array]:
    """Attention by the layers of DeepSeek-V3, each of which adds its outputs to the queries; returns the last lse."""
    x, *rest = inputs
    attend = _attention(*inputs)

    def layer(carry: tuple[Array, Array], _):
        out, lse = attend(carry[0], *rest)
        return (carry[0] + out, lse), None

    B, S, H, _ = x.shape
    return jax.lax.scan(layer, (x, jnp.zeros((B, H, S), jnp.float32)), None, length=DEPTH)[0]


def _attention(q_latent: Array, q_rope: Array, kv_pages: Array, page_table: Array, seq_lens: Array):
    """`mla_decode` with a plan for all layers."""
    _, S, H, _ = q_latent.shape
    plan = plan_decode(seq_lens, num_queries=S, num_heads=H)
    return functools.partial(mla_decode, plan=plan, softmax_scale=SOFTMAX_SCALE)


def aot_cases() -> list[AotCase]:
    """Layers one after another, in which nothing is between the kernels, and in a loop."""
    return [
        AotCase(
            f"mla_decode 3 layers in line {IN_LINE.name}",
            functools.partial(layers_in_line, num_layers=3),
            IN_LINE.shapes(),
            (BF16_MMA,),
            expect=functools.partial(_unexpected, Counter({KERNEL: 1 + 2 * 3})),
        ),
        AotCase(
            f"mla_decode {DEPTH} layers in a loop {SCANNED.name}",
            layers_scanned,
            SCANNED.shapes(),
            (BF16_MMA,),
            expect=functools.partial(_unexpected, Counter({KERNEL: 1 + 2}) + LOOP),
        ),
    ]


def _unexpected(expected: Counter[str], hlo: str) -> list[str]:
    found = launches(hlo)
    return [] if found == expected else [f"launches {dict(found)}, not {dict(expected)}"]
