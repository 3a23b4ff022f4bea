"""The table of names is a bijection, and it is DeepSeek's own listing of the 671B checkpoint."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.convert import official_shape, official_view, to_official
from dsv3_jax.interop.hf_names import SCALE_SUFFIX, TABLE, entries, flatten, official_tensors, unflatten
from dsv3_jax.model.params import abstract_params
from tests.small import make_config

DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F32": "float32"}

SMALL = make_config(num_layers=5, num_dense_layers=2, mtp_depth=2)
SHAPES_OF_MODELS = {
    "full": ModelConfig(),
    "small": SMALL,
    "full_query": dataclasses.replace(SMALL, mla=dataclasses.replace(SMALL.mla, q_latent_dim=None)),
    "no_shared": dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, num_shared_experts=0)),
    "no_bias": dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, has_bias=False)),
    "no_mtp": dataclasses.replace(SMALL, mtp_depth=0),
    "all_dense": dataclasses.replace(SMALL, num_dense_layers=5, mtp_depth=0),
    "all_moe": dataclasses.replace(SMALL, num_dense_layers=0),
}


@pytest.fixture(scope="module")
def listing(golden) -> dict:
    """Every tensor of the released checkpoint, its templates written out."""
    data = json.loads((golden / "hf_deepseek_v3_tensors.json").read_text())
    tensors = dict(data["top"])

    def fill(template: dict, old: int, layers: range) -> None:
        for layer in layers:
            for name, value in template.items():
                renamed = name.replace(f"layers.{old}.", f"layers.{layer}.")
                for expert in range(256) if ".experts.0." in name else range(1):
                    tensors[renamed.replace("experts.0.", f"experts.{expert}.")] = value

    fill(data["dense_layer_0"], 0, range(3))
    fill(data["moe_layer_3_expert0_only"], 3, range(3, 61))
    fill(data["mtp_layer_61_expert0_only"], 61, range(61, 62))
    assert len(tensors) == data["counts"]["tensors"]
    return {"counts": data["counts"], "tensors": tensors}


def test_names_shapes_and_dtypes_of_671b_are_the_released_ones(listing):
    ours = list(official_tensors(ModelConfig(), "float8_e4m3fn"))
    expected = {name: (tuple(shape), DTYPES[dtype]) for name, (shape, dtype) in listing["tensors"].items()}
    assert len(ours) == 91_991
    assert {name: (shape, dtype) for name, shape, dtype in ours} == expected


def test_counts_of_671b(listing):
    cfg, counts = ModelConfig(), listing["counts"]
    assert sum(math.prod(shape) for _, shape, _ in official_tensors(cfg, "float8_e4m3fn")) == 684_531_386_000
    trained = [entry for entry in entries(cfg) if not entry.path.startswith("router_state/")]
    is_mtp = [entry.key.startswith("model.layers.61.") for entry in trained]
    bias = 256
    main = sum(math.prod(e.shape) for e, mtp in zip(trained, is_mtp) if not mtp) + 58 * bias
    assert main == counts["main_params"] == 671_026_419_200
    of_mtp = [e for e, mtp in zip(trained, is_mtp) if mtp]
    assert sum(math.prod(e.shape) for e in of_mtp) + bias == counts["mtp_params"]
    assert sum(math.prod(e.shape) for e in of_mtp if not e.is_copy) + bias == counts["mtp_unique"]


@pytest.mark.parametrize("name", SHAPES_OF_MODELS)
def test_each_number_of_ours_has_exactly_one_official_place(name):
    cfg = SHAPES_OF_MODELS[name]
    found = list(entries(cfg))
    assert max(Counter(entry.key for entry in found).values()) == 1
    unique = [entry for entry in found if not entry.is_copy]
    assert max(Counter((entry.path, str(entry.index)) for entry in unique).values()) == 1
    sizes = Counter()
    for entry in unique:
        sizes[entry.path] += math.prod(entry.shape)
    assert sizes == {path: math.prod(spec.shape) for path, spec in flatten(abstract_params(cfg)).items()}


def test_every_number_goes_out_and_comes_back_to_its_place():
    cfg = SMALL
    start, ours = 0, {}
    for path, spec in flatten(abstract_params(cfg)).items():
        ours[path] = np.arange(start, start + math.prod(spec.shape)).reshape(spec.shape)
        start += math.prod(spec.shape)
    back = {path: np.full_like(leaf, -1) for path, leaf in ours.items()}
    for entry in entries(cfg):
        official = to_official(ours[entry.path][entry.index], entry.input_axes)
        assert official.shape == entry.shape
        index = entry.index or (...,)
        official_view(back[entry.path][index], entry.input_axes)[...] = official
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf)


@pytest.mark.parametrize(
    ("shape", "input_axes", "official"),
    [((8, 2, 6), 1, (12, 8)), ((2, 6, 32), 2, (32, 12)), ((32, 8), 1, (8, 32)), ((7,), 0, (7,)), ((9, 4), 0, (9, 4))],
)
def test_official_shape(shape, input_axes, official):
    assert official_shape(shape, input_axes) == official


def test_head_rows_stay_together():
    """q_b_proj row h·(I+R) + j is our q_up[:, h, j]."""
    q_up = np.random.default_rng(0).normal(size=(5, 3, 4))
    np.testing.assert_array_equal(to_official(q_up, 1)[2 * 4 + 1], q_up[:, 2, 1])


def test_router_bias_is_float32_in_every_dtype():
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        kinds = {kind for name, _, kind in official_tensors(SMALL, dtype) if name.endswith("e_score_correction_bias")}
        assert kinds == {"float32"}


def test_scales_only_in_fp8():
    assert not any(name.endswith(SCALE_SUFFIX) for name, _, _ in official_tensors(SMALL, "bfloat16"))
    fp8 = list(official_tensors(SMALL, "float8_e4m3fn"))
    assert sum(kind == "float8_e4m3fn" for _, _, kind in fp8) == sum(name.endswith(SCALE_SUFFIX) for name, _, _ in fp8)


def test_every_row_of_the_table_is_used():
    used = {entry.key for cfg in SHAPES_OF_MODELS.values() if cfg.num_layers < 10 for entry in entries(cfg)}
    for rows in TABLE.values():
        for row in rows:
            assert any(row.key.format(layer=layer, expert=0) in used for layer in range(7)), row


def test_unflatten_undoes_flatten():
    tree = {"params": {"a": {"b": 1}, "c": 2}, "router_state": {}}
    assert unflatten(flatten(tree)) == tree
