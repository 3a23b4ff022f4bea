"""What training carries from step to step on the device."""

from functools import partial
from typing import Any, NamedTuple

import jax

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import init
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.typing import Params, Variables


class TrainState(NamedTuple):
    """A pytree of plain arrays."""

    params: Params
    router_state: Params
    opt_state: Any

    @property
    def variables(self) -> Variables:
        """What the model's functions read."""
        return {"params": self.params, "router_state": self.router_state}


def init_state(cfg: RunConfig) -> TrainState:
    """The state before the first step, on the default device."""
    return _fresh_state_jitted(cfg)


def abstract_state(cfg: RunConfig) -> TrainState:
    """Shapes and dtypes of `init_state(cfg)`; allocates nothing."""
    return jax.eval_shape(partial(_fresh_state, cfg))


def _fresh_state(cfg: RunConfig) -> TrainState:
    variables = init(cfg.model, jax.random.key(cfg.seed), functions_for(cfg.precision).param_dtype)
    opt_state = make_optimizer(cfg.train.optimizer, cfg.model, moment_dtype=cfg.moment_dtype).init(variables["params"])
    return TrainState(variables["params"], variables["router_state"], opt_state)


# It runs once: most of XLA's optimisation would cost more than it saves. Compiler options may not be nested in
# another trace, so shapes are read from the function without them.
_fresh_state_jitted = jax.jit(
    _fresh_state, static_argnames=("cfg",), compiler_options={"xla_backend_optimization_level": 1}
)
