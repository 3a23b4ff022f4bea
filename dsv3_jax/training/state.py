"""What training carries from step to step on the device."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import ParamSpec, abstract_params, init
from dsv3_jax.parallel.sharding import store
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


def init_state(cfg: RunConfig, shardings: TrainState | None = None) -> TrainState:
    """The state before the first step: on the default device, or drawn as `shardings` lay it, whole nowhere.

    The numbers are the same either way.
    """
    if shardings is None:
        return _fresh_state_jitted(cfg)
    draw = jax.jit(partial(_fresh_state, cfg), out_shardings=shardings, compiler_options=_COMPILED_FOR_ONE_CALL)
    return draw()


def state_shardings(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """How each array of the state lies on a mesh: parameters as `store` splits them, moments like their parameters."""
    specs = abstract_params(cfg.model)["params"]
    whole = NamedSharding(mesh, PartitionSpec())

    def of(spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, store(spec, mesh).spec)

    params = jax.tree.map(of, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    abstract = abstract_state(cfg)

    def of_parameter(path: Any, _: Any) -> NamedSharding:
        """A moment's path ends as its parameter's: dicts in the tuples of the optimizer."""
        node: Any = params
        for key in path:
            node = node[key.key] if isinstance(key, jax.tree_util.DictKey) else node
        return node if isinstance(node, NamedSharding) else whole

    opt_state = jax.tree_util.tree_map_with_path(of_parameter, abstract.opt_state)
    return TrainState(params, jax.tree.map(lambda _: whole, abstract.router_state), opt_state)


def abstract_state(cfg: RunConfig) -> TrainState:
    """Shapes and dtypes of `init_state(cfg)`; allocates nothing."""
    return jax.eval_shape(partial(_fresh_state, cfg))


def _fresh_state(cfg: RunConfig) -> TrainState:
    variables = init(cfg.model, jax.random.key(cfg.seed), functions_for(cfg.precision).param_dtype)
    opt_state = make_optimizer(cfg.train.optimizer, cfg.model, moment_dtype=cfg.moment_dtype).init(variables["params"])
    return TrainState(variables["params"], variables["router_state"], opt_state)


# It runs once: most of XLA's optimisation would cost more than it saves. Compiler options may not be nested in
# another trace, so shapes are read from the function without them.
_COMPILED_FOR_ONE_CALL: Any = {"xla_backend_optimization_level": 1}
_fresh_state_jitted = jax.jit(_fresh_state, static_argnames=("cfg",), compiler_options=_COMPILED_FOR_ONE_CALL)
