"""The form of an op that runs: Pallas on a Hopper GPU, XLA anywhere else, the reference on request.

Every op takes `implementation=None | "reference" | "xla" | "pallas"`, as `jax.nn.dot_product_attention` does. A form
that cannot serve its inputs raises NotImplementedError, and with None the next one is tried.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

OLDEST_PALLAS_JAX = (0, 11, 2)


def run(op: str, forms: Mapping[str, Callable[..., Any]], implementation: str | None, *args, **kwargs) -> Any:
    """Calls the form named `implementation`; with None, "pallas" where it can run, else "xla".

    Args:
        op: the name of the op, for messages.
        forms: "reference" and "xla", and "pallas" where there is one; all with one signature.
    Raises:
        ValueError: an unknown `implementation`.
        NotImplementedError: `implementation="pallas"` where it cannot run, with the reason.
    """
    if implementation is not None:
        if implementation not in forms:
            raise ValueError(f"implementation={implementation!r} of {op} is unknown; use None, {_listed(forms)}.")
        obstacle = why_no_pallas() if implementation == "pallas" else None
        if obstacle:
            raise NotImplementedError(f'{op}(implementation="pallas") {obstacle}; leave it None to run the XLA form.')
        return forms[implementation](*args, **kwargs)
    if "pallas" in forms and why_no_pallas() is None:
        try:
            return forms["pallas"](*args, **kwargs)
        except NotImplementedError:
            pass  # its inputs are beyond the kernel
    return forms["xla"](*args, **kwargs)


def why_no_pallas() -> str | None:
    """Why the Hopper kernels cannot run in this process, or None if they can."""
    if jax.__version_info__ < OLDEST_PALLAS_JAX:
        return f"needs jax {'.'.join(map(str, OLDEST_PALLAS_JAX))} or newer, this is {jax.__version__}"
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs a Hopper GPU (compute capability 9.0), jax runs on {device.platform}"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), {device.device_kind} has {capability}"
    return None


def _listed(forms: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in forms)
