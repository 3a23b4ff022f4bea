"""`scaled_dot_product_attention` by one named backend, and `flex_attention`."""

import importlib
from collections.abc import Callable
from typing import Any

BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}


def attend(torch: Any, backend: str, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """[B, H, T, I], [B, H, S, I], [B, H, S, W] -> [B, H, T, W]; RuntimeError where the backend cannot."""
    attention = importlib.import_module("torch.nn.attention")
    with attention.sdpa_kernel(getattr(attention.SDPBackend, BACKENDS[backend])):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def additive(torch: Any, is_visible: Any) -> Any:
    """Booleans -> 0 or -inf in bf16: given a boolean mask, torch would make this at each call."""
    zeros = torch.zeros(is_visible.shape, dtype=torch.bfloat16, device=is_visible.device)
    return zeros.masked_fill_(~is_visible, float("-inf"))


def flex(torch: Any, is_visible: Callable[..., Any], shape: tuple[int, int, int], device: str) -> Callable[..., Any]:
    """`flex_attention` compiled for one shape, with its plan of blocks for (B, T, S), which is not timed.

    On a CPU, where it has no backward pass, it is not compiled.
    """
    module = importlib.import_module("torch.nn.attention.flex_attention")
    B, T, S = shape
    mask = module.create_block_mask(is_visible, B, None, T, S, device=device)
    if device == "cpu":
        return lambda q, k, v, **options: module.flex_attention(q, k, v, block_mask=mask, **options)
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False  # else no graph is kept for a second backward pass
    torch.compiler.reset()  # past a few shapes torch gives up compiling
    compiled = torch.compile(module.flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v, **options: compiled(q, k, v, block_mask=mask, **options)
