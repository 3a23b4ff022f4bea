"""The parameter tree: one contract for fresh values and abstract shapes."""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.moe.router import stack_bias
from dsv3_jax.model.params import (
    ParamSpec,
    abstract_params,
    draw,
    init,
)
from dsv3_jax.model.tree import model_tree
from dsv3_jax.training.optimizer import router_biases, with_router_biases

CONFIGS = {
    "all": {},
    "no_q_latent": {"mla": {"q_latent_dim": None}, "mtp_depth": 2},
    "no_shared": {"moe": {"num_shared_experts": 0}, "mtp_depth": 0},
    "no_dense": {"num_dense_layers": 0},
    "no_moe": {"num_dense_layers": 3, "mtp_depth": 0},
    "no_bias": {"moe": {"has_bias": False}},
}


# Of the tests that draw numbers: one compilation for all.
DRAWN = {"model_dim": 48, "init_std": 0.006, "mtp_depth": 2}


def flat(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def specs(cfg: ModelConfig, dtype=jnp.float32) -> dict[str, ParamSpec]:
    return flat(abstract_params(cfg, dtype), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_tree_is_the_abstract_tree(config, name: str, dtype) -> None:
    cfg = config(**CONFIGS[name])
    values, abstract = flat(jax.eval_shape(lambda: init(cfg, jax.random.key(0), dtype))), specs(cfg, dtype)
    assert values.keys() == abstract.keys()
    for path, spec in abstract.items():
        assert (values[path].shape, values[path].dtype) == (spec.shape, spec.dtype), path
        assert len(spec.axes) == len(spec.shape), path
        assert spec.dtype == (jnp.float32 if path.startswith("router_state") else dtype), path
        assert re.fullmatch(r"(params|router_state)(/[a-z]+(_[a-z]+)*)+", path), path


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_model_does_not_have_is_absent(config, name: str) -> None:
    cfg = config(**CONFIGS[name])
    paths = set(specs(cfg))

    def has(part: str) -> bool:
        return any(f"/{part}/" in f"{path}/" for path in paths)

    assert has("dense_layers") == (cfg.num_dense_layers > 0)
    assert has("moe_layers") == (cfg.num_moe_layers > 0)
    assert has("mtp") == (cfg.mtp_depth > 0)
    assert any(p.startswith("router_state/") for p in paths) == (cfg.moe.has_bias and has("moe"))
    assert has("shared") == (cfg.moe.num_shared_experts > 0 and has("moe"))
    assert has("q") == (cfg.mla.q_latent_dim is None)
    assert has("q_up") == has("q_down") == has("q_norm") == (cfg.mla.q_latent_dim is not None)


def test_the_tree_as_documented(config) -> None:
    cfg = config(mtp_depth=2)
    V, D, F, H, Q, C = 67, 20, 26, 3, 14, 10
    I, R, W, E, X = 7, 6, 5, 6, 9
    mla = {
        "mla/q_down": (D, Q), "mla/q_norm": (Q,), "mla/q_up": (Q, H, I + R), "mla/kv_down": (D, C + R),
        "mla/kv_norm": (C,), "mla/kv_up": (C, H, I + W), "mla/out": (H, W, D), "attn_norm/scale": (D,),
        "ffn_norm/scale": (D,),
    }  # fmt: skip
    moe = {
        "moe/router/w": (D, E), "moe/experts/gate_up": (E, D, 2, X), "moe/experts/down": (E, X, D),
        "moe/shared/gate_up": (D, 2, X), "moe/shared/down": (X, D),
    }  # fmt: skip
    join = {"embed_norm/scale": (D,), "hidden_norm/scale": (D,), "norm/scale": (D,), "proj/w": (2 * D, D)}
    expected = {"params/embed/w": (V, D), "params/unembed/w": (D, V), "params/final_norm/scale": (D,)}
    expected |= {
        f"params/dense_layers/{path}": (1, *shape)
        for path, shape in {**mla, "mlp/gate_up": (D, 2, F), "mlp/down": (F, D)}.items()
    }
    expected |= {f"params/moe_layers/{path}": (2, *shape) for path, shape in {**mla, **moe}.items()}
    expected |= {f"params/mtp/{path}": (2, *shape) for path, shape in join.items()}
    expected |= {f"params/mtp/block/{path}": (2, *shape) for path, shape in {**mla, **moe}.items()}
    expected |= {f"router_state/{path}/moe/router/bias": (2, E) for path in ("moe_layers", "mtp/block")}
    assert {path: spec.shape for path, spec in specs(cfg).items()} == expected


def test_fresh_values(config) -> None:
    """Norms 1, biases 0, weights N(0, init_std²) and different in every leaf and layer."""
    cfg = config(**DRAWN)
    seen = []
    for path, leaf in flat(init(cfg, jax.random.key(3))).items():
        values = np.asarray(leaf, np.float64)
        if path.endswith("bias"):
            np.testing.assert_array_equal(values, 0)
        elif "norm" in path:
            np.testing.assert_array_equal(values, 1)
        else:
            assert abs(values.std() / 0.006 - 1) < 5 / np.sqrt(2 * values.size), path
            assert abs(values.mean()) < 5 * 0.006 / np.sqrt(values.size), path
            assert np.abs(values).max() < 7 * 0.006, path
            is_stack = "layers" in path or "mtp" in path
            layers = values if is_stack else values[None]
            seen += [tuple(layer.ravel()[:4]) for layer in layers]
    assert len(seen) == len(set(seen)), "two leaves, or two layers, share random numbers"


def test_keys_decide_everything(config) -> None:
    cfg = config(**DRAWN)
    first, again, other = (init(cfg, jax.random.key(seed))["params"] for seed in (1, 1, 2))
    for path, leaf in flat(first).items():
        np.testing.assert_array_equal(leaf, flat(again)[path])
        assert "norm" in path or np.abs(np.asarray(leaf - flat(other)[path])).max() > 0, path


def test_init_runs_inside_a_jit_and_gives_the_same(config) -> None:
    cfg, key = config(num_layers=1, mtp_depth=0), jax.random.key(5)
    inside = jax.jit(lambda: init(cfg, key), compiler_options={"xla_backend_optimization_level": 1})()
    for path, leaf in flat(init(cfg, key)).items():
        np.testing.assert_allclose(flat(inside)[path], leaf, rtol=1e-6, err_msg=path)


def test_bfloat16_values_are_the_rounded_float32_ones(config) -> None:
    cfg = config(**DRAWN)
    wide, narrow = (init(cfg, jax.random.key(4), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for path, leaf in flat(wide["params"]).items():
        np.testing.assert_array_equal(leaf.astype(jnp.bfloat16), flat(narrow["params"])[path])
    assert flat(narrow["router_state"]).keys() == flat(wide["router_state"]).keys()
    assert all(leaf.dtype == jnp.float32 for leaf in flat(narrow["router_state"]).values())


def test_deeper_models_keep_the_names_of_shallow_ones(config) -> None:
    assert specs(config()).keys() == specs(config(num_layers=40, num_dense_layers=7)).keys()


def test_a_leaf_is_drawn_by_its_path(config) -> None:
    """A tree with more leaves than before draws the others as before."""
    cfg, key = config(**DRAWN), jax.random.key(3)
    names = [name.encode() for name in specs(ModelConfig()).keys() | specs(config(mla={"q_latent_dim": None}))]
    assert len({zlib.crc32(name) for name in names}) == len(names)
    alone = draw({"params": {"unembed": model_tree(cfg)["params"]["unembed"]}}, key, std=cfg.init_std, dtype="float32")
    ours = init(cfg, key)["params"]["unembed"]["w"]
    np.testing.assert_allclose(ours, alone["params"]["unembed"]["w"], rtol=1e-5)


@pytest.mark.parametrize("name", ["all", "no_bias", "no_mtp", "only_mtp"])
def test_router_biases_go_out_and_in_again(config, variables_of, name: str) -> None:
    """Main layers first, then MTP modules; any of them may be absent."""
    changes = {"no_mtp": {"mtp_depth": 0}, "only_mtp": {"num_dense_layers": 3, "mtp_depth": 2}, **CONFIGS}[name]
    router_state = variables_of(config(**changes), seed=8)["router_state"]
    stacks = [stack_bias(router_state, stack) for stack in ("moe_layers", "mtp")]
    assert [bias is not None for bias in stacks] == [stack in router_state for stack in ("moe_layers", "mtp")]
    biases = router_biases(router_state)
    assert biases.shape == {"all": (3, 6), "no_bias": (0, 1), "no_mtp": (2, 6), "only_mtp": (2, 6)}[name]
    expected = [bias for bias in stacks if bias is not None]
    np.testing.assert_array_equal(biases, np.concatenate(expected) if expected else np.zeros((0, 1)))
    doubled = with_router_biases(router_state, 2 * biases)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, 2 * old), doubled, router_state)
