"""Saving: bit for bit there and back, official layout, whole or not at all."""

import dataclasses
import filecmp
import json
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv3_jax as ds
from dsv3_jax.config.check import ConfigError, UserError
from dsv3_jax.interop import fill, load
from dsv3_jax.interop.hf_names import entries, flatten, official_tensors, unflatten
from dsv3_jax.interop.safetensors_io import DTYPES, INDEX, SINGLE, CheckpointError, read_folder, read_header
from dsv3_jax.interop.save import _bytes

TINY = ("tiny_a", "tiny_b", "tiny_c", "tiny_d")
ALL_DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    assert filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_save_load_is_bit_identical(golden, tmp_path, name, dtype, assert_same_bits):
    cfg, variables = ds.load_pretrained(golden / "hf" / name, dtype=dtype)
    ds.save_pretrained(tmp_path / "out", cfg, variables, dtype=dtype)
    loaded_cfg, loaded = ds.load_pretrained(tmp_path / "out", dtype=dtype)
    assert loaded_cfg == cfg
    assert_same_bits(loaded, variables)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_our_export_read_and_exported_again_is_byte_identical(golden, tmp_path, name, dtype):
    cfg, variables = ds.load_pretrained(golden / "hf" / name)
    ds.save_pretrained(tmp_path / "one", cfg, variables, dtype=dtype, max_shard_size="150KB")
    again = ds.load_pretrained(tmp_path / "one")
    ds.save_pretrained(tmp_path / "two", *again, dtype=dtype, max_shard_size="150KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert_same_files(tmp_path / "one", tmp_path / "two")


@given(
    dims=st.fixed_dictionaries({name: st.integers(1, 7) for name in ("kv_latent_dim", "nope_head_dim", "v_head_dim")}),
    num_heads=st.integers(1, 3),
    q_latent_dim=st.none() | st.integers(1, 9),
    model_dim=st.sampled_from([4, 130, 257]),
    num_dense_layers=st.integers(0, 2),
    num_shared_experts=st.integers(0, 2),
    mtp_depth=st.integers(0, 2),
    dtype=st.sampled_from(ALL_DTYPES),
    shard=st.sampled_from([1, 50_000, "5GB"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_survives(
    tmp_path_factory, random_variables, assert_same_bits, small, dims, num_heads, q_latent_dim, model_dim,
    num_dense_layers, num_shared_experts, mtp_depth, dtype, shard, seed,
):  # fmt: skip
    cfg = dataclasses.replace(
        small,
        num_layers=2,
        model_dim=model_dim,
        num_dense_layers=num_dense_layers,
        mtp_depth=mtp_depth,
        mla=dataclasses.replace(small.mla, num_heads=num_heads, q_latent_dim=q_latent_dim, **dims),
        moe=dataclasses.replace(small.moe, num_shared_experts=num_shared_experts),
    )
    folder = tmp_path_factory.mktemp("any")
    variables = random_variables(cfg, seed=seed)
    ds.save_pretrained(folder / "one", cfg, variables, dtype=dtype, max_shard_size=shard)
    loaded_cfg, loaded = ds.load_pretrained(folder / "one")
    assert loaded_cfg == cfg
    if dtype == "float32":
        assert_same_bits(loaded, variables)
    ds.save_pretrained(folder / "two", cfg, loaded, dtype=dtype, max_shard_size=shard)
    assert_same_files(folder / "one", folder / "two")


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_names_shapes_and_dtypes_are_the_official_ones(tmp_path, small, random_variables, dtype):
    ds.save_pretrained(tmp_path / "out", small, random_variables(small), dtype=dtype)
    stored = read_folder(tmp_path / "out")
    found = {name: (t.shape, DTYPES[t.dtype].name) for name, t in stored.items()}
    assert found == {name: (shape, kind) for name, shape, kind in official_tensors(small, dtype)}


def test_fp8_export_of_the_golden_has_its_names_dtypes_and_shapes(golden, tmp_path):
    cfg, variables = ds.load_pretrained(golden / "hf" / "tiny_c")
    ds.save_pretrained(tmp_path / "out", cfg, variables, dtype="float8_e4m3fn")
    lines = (golden / "hf" / "tiny_c" / "tensor_names.txt").read_text().splitlines()
    stored = read_folder(tmp_path / "out")
    assert sorted(f"{n}\t{DTYPES[t.dtype].name}\t{list(t.shape)}" for n, t in stored.items()) == sorted(lines)


def test_mtp_copies_are_written(golden, tmp_path):
    cfg, variables = ds.load_pretrained(golden / "hf" / "tiny_c")
    ds.save_pretrained(tmp_path / "out", cfg, variables)
    stored = read_folder(tmp_path / "out")
    for main, copy in (("model.embed_tokens", "embed_tokens"), ("lm_head", "shared_head.head")):
        np.testing.assert_array_equal(stored[f"{main}.weight"].read(), stored[f"model.layers.2.{copy}.weight"].read())


def test_fp8_error_is_within_half_a_step(tmp_path, small, random_variables):
    variables = random_variables(small)
    ds.save_pretrained(tmp_path / "out", small, variables, dtype="float8_e4m3fn")
    before, after = flatten(variables), flatten(ds.load_pretrained(tmp_path / "out")[1])
    for entry in entries(small):
        x, y = (np.asarray(tree[entry.path])[entry.index] for tree in (before, after))
        if entry.path.startswith("router_state"):
            np.testing.assert_array_equal(x, y)
        else:
            bound = 2.0**-4 if entry.is_fp8 else 2.0**-8
            assert (np.abs(x - y) <= bound * np.abs(x) + (np.abs(x).max() / 448 * 2.0**-10)).all(), entry.key


def test_shards_have_official_names_and_a_complete_index(tmp_path, small, random_variables):
    ds.save_pretrained(tmp_path / "out", small, random_variables(small), dtype="float8_e4m3fn", max_shard_size=60_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:06d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    stored = read_folder(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.stop - t.start for t in stored.values())
    for file in files:
        tensors = read_header(file)
        payload = sum(t.stop - t.start for t in tensors.values())
        assert payload <= 60_000 or len(tensors) <= 2
        assert {name for name, place in index["weight_map"].items() if place == file.name} == tensors.keys()


def test_one_shard_has_no_index(tmp_path, small, random_variables):
    ds.save_pretrained(tmp_path / "out", small, random_variables(small))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        SINGLE,
    ]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == small.eos_id


def test_arrays_of_any_kind_and_place_are_saved_alike(tmp_path, small, random_variables, devices):
    variables = random_variables(small)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)

    def spread(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % 8 == 0), None)
        spec = [None] * leaf.ndim
        if axis is not None:
            spec[axis] = "x"
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

    kinds = {"one": variables, "numpy": jax.tree.map(np.asarray, variables), "eight": jax.tree.map(spread, variables)}
    for name, tree in kinds.items():
        ds.save_pretrained(tmp_path / name, small, tree, max_shard_size=60_000)
        assert_same_files(tmp_path / "one", tmp_path / name)


def leave_out(variables: dict, path: str) -> dict:
    return unflatten({name: leaf for name, leaf in flatten(variables).items() if name != path})


def test_variables_of_another_config(tmp_path, small, random_variables):
    variables = random_variables(small)
    with pytest.raises(ConfigError, match="variables lack 'params/moe_layers/mla/q_up'"):
        ds.save_pretrained(tmp_path / "out", small, leave_out(variables, "params/moe_layers/mla/q_up"))
    with pytest.raises(ConfigError, match="extra leaf 'params/mtp/"):
        ds.save_pretrained(tmp_path / "out", dataclasses.replace(small, mtp_depth=0), variables)
    with pytest.raises(ConfigError, match=r"'params/dense_layers/mlp/down' has shape .*160.*asks for .*161"):
        ds.save_pretrained(tmp_path / "out", dataclasses.replace(small, ffn_dim=161), variables)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "float16"}, "dtype='float16' cannot be saved"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples' is not a size"),
        ({"max_shard_size": 0}, "must be positive"),
        ({"max_shard_size": -1}, "must be positive"),
        ({"max_shard_size": "0GB"}, "must be positive"),
        ({"max_shard_size": float("nan")}, "must be positive"),
        ({"max_shard_size": "-5GB"}, "is not a size"),
        ({"max_shard_size": "²GB"}, "is not a size"),
        ({"max_shard_size": "9" * 5000}, "is not a size"),
        ({"max_shard_size": ""}, "is not a size"),
    ],
)
def test_bad_arguments(tmp_path, small, random_variables, arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        ds.save_pretrained(tmp_path / "out", small, random_variables(small), **arguments)
    assert not list(tmp_path.iterdir())


def test_sizes_are_read_as_written(small):
    assert [_bytes(size) for size in ("5GB", "5 GiB", "1tb", "10", "2KiB", 7, 2.5e9)] == [
        5 * 10**9, 5 * 2**30, 10**12, 10, 2048, 7, 2.5e9,
    ]  # fmt: skip


def test_nan_is_not_spread_over_a_block(tmp_path, small, random_variables):
    variables = random_variables(small)
    flat = flatten(variables)
    flat["params/mtp/block/mla/out"] = flat["params/mtp/block/mla/out"].at[0, 1, 2, 3].set(np.nan)
    with pytest.raises(ConfigError, match=r"model.layers.4.self_attn.o_proj.weight: holds a NaN"):
        ds.save_pretrained(tmp_path / "out", small, unflatten(flat), dtype="float8_e4m3fn")
    assert not list(tmp_path.iterdir())
    ds.save_pretrained(tmp_path / "out", small, unflatten(flat), dtype="float32")


def test_own_export_is_replaced_and_nothing_else_is(tmp_path, small, random_variables, without_mtp):
    folder, variables = tmp_path / "out", random_variables(small)
    folder.mkdir()
    ds.save_pretrained(folder, small, variables, max_shard_size=60_000)
    ds.save_pretrained(folder, *without_mtp(small, variables))
    assert ds.load_pretrained(folder)[0].mtp_depth == 0
    assert not (folder / INDEX).exists()

    (folder / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and not an earlier export of ours.*overwrite=True"):
        ds.save_pretrained(folder, small, variables)
    assert (folder / "notes.md").exists()
    ds.save_pretrained(folder, small, variables, overwrite=True)
    assert not (folder / "notes.md").exists()
    assert ds.load_pretrained(folder)[0] == small
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoint_of_others_is_not_replaced(copy_of_golden, small, random_variables):
    folder = copy_of_golden("tiny_a")
    for extra in ("expected.npz", "tensor_names.txt", "config_as_saved_by_transformers5.json"):
        (folder / extra).unlink()
    with pytest.raises(ConfigError, match="not an earlier export of ours"):
        ds.save_pretrained(folder, small, random_variables(small))


def test_file_in_the_way(tmp_path, small, random_variables):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        ds.save_pretrained(tmp_path / "out", small, random_variables(small))
    with pytest.raises(CheckpointError, match=r"below: cannot be made \("):
        ds.save_pretrained(tmp_path / "out" / "below", small, random_variables(small))


@pytest.fixture
def disk_that_fills():
    """Lets no file grow past 100 kB, as a disk that fills up while a file is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_disk_that_fills_leaves_nothing_and_keeps_the_old(tmp_path, small, random_variables, request, without_mtp):
    folder, variables = tmp_path / "out", random_variables(small)
    ds.save_pretrained(folder, *without_mtp(small, variables))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    request.getfixturevalue("disk_that_fills")
    for target in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=r"writing failed \(File too large\).*needs [\d,]+ bytes.*are free"):
            ds.save_pretrained(target, small, variables)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_model_larger_than_any_disk_is_refused_at_once(tmp_path, small):
    """Petabytes, of which no number exists: only shapes are looked at before the disk is."""
    cfg = dataclasses.replace(small, vocab_size=10**9, model_dim=10**6)
    specs = flatten(ds.abstract_params(cfg))
    variables = unflatten({path: np.broadcast_to(np.float32(0), spec.shape) for path, spec in specs.items()})
    with pytest.raises(CheckpointError, match=r"the export needs [\d,]+ bytes, but [\d,]+ are free"):
        ds.save_pretrained(tmp_path / "out", cfg, variables, dtype="float32")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, dsv3_jax as ds
cfg, variables = ds.load_pretrained(sys.argv[1])
print("ready", flush=True)
while True:
    ds.save_pretrained(sys.argv[2], cfg, variables, dtype="float32", max_shard_size="100KB")
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5])
def test_killed_while_saving_leaves_a_whole_folder_or_none(golden, tmp_path, seconds, repository, assert_same_bits):
    source = golden / "hf" / "tiny_d"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, source, tmp_path / "out"],
        stdout=subprocess.PIPE,
        cwd=repository,
        env={"PYTHONPATH": f"{repository}:{repository / 'kernels'}", "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
    process.stdout.close()
    if (tmp_path / "out").exists():
        assert_same_bits(ds.load_pretrained(tmp_path / "out")[1], ds.load_pretrained(source)[1])


def test_peak_memory_is_the_model_and_one_tensor(tmp_path, small, random_variables):
    cfg = dataclasses.replace(small, model_dim=512, ffn_dim=512, moe=dataclasses.replace(small.moe, expert_dim=384))
    variables = random_variables(cfg)
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    largest = 4 * max(int(np.prod(entry.shape)) for entry in entries(cfg))
    assert model > 20 * largest
    slack = 1_000_000

    tracemalloc.start()
    for dtype, copies in (("float32", 3), ("float8_e4m3fn", 6)):
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        ds.save_pretrained(tmp_path / dtype, cfg, variables, dtype=dtype)
        assert tracemalloc.get_traced_memory()[1] - start < copies * largest + slack
    for dtype, copies in (("float32", 3), ("float8_e4m3fn", 6)):
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        loaded = ds.load_pretrained(tmp_path / dtype)[1]
        assert tracemalloc.get_traced_memory()[1] - start < copies * largest + slack  # the model is in pages of its own
        del loaded
    tracemalloc.stop()


def test_jax_takes_the_loaded_stacks_over_without_a_copy(golden, monkeypatch):
    places: set[int] = set()

    def recorded(specs):
        arrays = fill.zeros(specs)
        places.update(array.ctypes.data for array in arrays.values())
        return arrays

    monkeypatch.setattr(load, "zeros", recorded)
    variables = ds.load_pretrained(golden / "hf" / "tiny_c")[1]
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(variables)} == places


def test_loaded_arrays_can_be_donated(golden):
    _, variables = ds.load_pretrained(golden / "hf" / "tiny_a")
    before = jax.tree.map(lambda leaf: np.array(leaf), variables)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(variables)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), before, doubled)


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<bos>", "<eos>"], show_progress=False)
    inner.train_from_iterator(["def f(x): return x"] * 3, trainer)
    inner.save(str(tmp_path / "given.json"))
    return tmp_path / "given.json"


def test_tokenizer_goes_along(tmp_path, small, random_variables, tokenizer_file):
    """It is changed in one thing, as it adds no bos by itself."""
    ds.save_pretrained(tmp_path / "out", small, random_variables(small), tokenizer=tokenizer_file)
    given, written = (json.loads(file.read_text()) for file in (tokenizer_file, tmp_path / "out" / "tokenizer.json"))
    assert written.pop("post_processor")["type"] == "TemplateProcessing"
    assert given.pop("post_processor") is None
    assert written == given
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<bos>", "<eos>")
    ds.save_pretrained(tmp_path / "out", small, random_variables(small))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_tokenizer_of_another_model(tmp_path, small, random_variables, tokenizer_file):
    cfg = dataclasses.replace(small, vocab_size=8)
    cases = {
        r"token id \d+, but vocab_size=8": tokenizer_file,
        "is missing": tmp_path / "none.json",
        "path is empty": "",
    }
    for reason, tokenizer in cases.items():
        with pytest.raises(UserError, match=reason):
            ds.save_pretrained(tmp_path / "out", cfg, random_variables(cfg), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


OWN = {
    "tokenizer_config.json": '{"chat_template": "x",  "add_bos_token": false}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": '{"temperature": 0.6}',
}


def test_an_official_folder_saved_again_over_itself_loses_nothing(
    copy_of_golden, tmp_path, tokenizer_file, assert_same_bits
):
    """What it came with stays byte for byte, ids that only config.json had too; then it is an export of ours."""
    folder = copy_of_golden("tiny_c")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 5], "pad_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    for name, text in OWN.items():
        (folder / name).write_text(text)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    cfg, variables = ds.load_pretrained(folder)
    ds.save_pretrained(folder, cfg, variables, "float32", tokenizer=folder, overwrite=True)
    assert {name: (folder / name).read_text() for name in OWN} == OWN
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    written = json.loads((folder / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([1, 5], 3)
    again_cfg, again = ds.load_pretrained(folder)
    assert again_cfg == cfg
    assert_same_bits(again, variables)
    ds.save_pretrained(folder, cfg, variables, "float32", tokenizer=folder)
    (folder / "chat_template_of_mine.jinja").write_text("x")
    with pytest.raises(ConfigError, match="not an earlier export"):
        ds.save_pretrained(folder, cfg, variables, "float32", tokenizer=folder)


def test_the_main_model_alone(tmp_path, small, random_variables, without_mtp):
    variables = random_variables(small)
    ds.save_pretrained(tmp_path / "out", small, variables, "float32", with_mtp=False)
    ds.save_pretrained(tmp_path / "expected", *without_mtp(small, variables), "float32")
    assert_same_files(tmp_path / "out", tmp_path / "expected")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_bfloat16_export_rounds_to_nearest(tmp_path, small, random_variables):
    variables = random_variables(small)
    ds.save_pretrained(tmp_path / "out", small, variables, dtype="bfloat16")
    loaded = flatten(ds.load_pretrained(tmp_path / "out")[1])
    for path, leaf in flatten(variables).items():
        x = np.asarray(leaf)
        expected = x if path.startswith("router_state") else x.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(loaded[path]), expected)


def test_an_export_that_is_stopped_leaves_nothing_and_what_was_there(tmp_path, small, random_variables):
    variables = random_variables(small)
    ds.save_pretrained(tmp_path / "out", small, variables, "float32", max_shard_size=100_000)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for allowed in (0, 1, 40):
        calls = iter(range(1000))

        def stop(calls=calls, allowed=allowed):
            if next(calls) == allowed:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ds.save_pretrained(tmp_path / "out", small, variables, "bfloat16", check_stop=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
