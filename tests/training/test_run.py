"""A run folder and what it belongs to: its configuration, its data, the version that wrote it."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.load import from_dict, override, to_dict
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.stored import complete
from dsv3_jax.interop.export import export
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.interrupt import StopRequest
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.checkpoint import load_variables
from dsv3_jax.training.checkpoint_files import HOST, MANIFEST, inventory
from dsv3_jax.training.metrics import Progress
from dsv3_jax.training.run import differences, open_run, steps
from dsv3_jax.training.step import make_step


@pytest.fixture(scope="module")
def stored(golden: Path) -> RunConfig:
    """The configuration of the stored run of version 0.1."""
    path = golden / "run_0_1" / "config.json"
    return from_dict(complete(json.loads(path.read_text()), where=str(path)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the stored run found its `text/`."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def write_sources(folder: Path, words: str = "more words") -> None:
    (folder / "text").mkdir(exist_ok=True)
    for i in range(6):
        lines = (f"line {j} of text {i}: {(i * 31 + j * 17) % 97} and {(i * j) % 89} {words}\n" for j in range(14))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def template(golden: Path, stored: RunConfig, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored run after a save by this version."""
    run_dir = tmp_path_factory.mktemp("template") / "run"
    shutil.copytree(golden / "run_0_1", run_dir)
    shutil.rmtree(run_dir / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sources)
        with open_run(stored, run_dir, log=lambda line: None) as run:
            run.progress = Progress(6, 320)
            run.save()
    return run_dir


@pytest.fixture
def run_dir(template: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sources(sources)
    monkeypatch.chdir(sources)
    return shutil.copytree(template, tmp_path / "run")


def resumed_at(cfg: RunConfig, run_dir: Path) -> tuple[int, list[str]]:
    """The step at which the run goes on, and what was said."""
    said: list[str] = []
    with open_run(cfg, run_dir, log=said.append) as run:
        return run.progress.step, said


@pytest.mark.slow
def test_the_stored_run_of_version_0_1_resumes_and_exports(
    golden: Path, stored: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the losses of older code on these batches, and no data sources in sight; exported by relative paths."""
    run_dir, said = shutil.copytree(golden / "run_0_1", tmp_path / "run"), []
    with open_run(override(stored, ["train.total_tokens=100_000"]), run_dir, log=said.append) as run:
        assert run.progress == (5, 256)
        taken = itertools.islice(steps(run, make_step(stored), stop=StopRequest()), 2)
        losses = [float(one.report.loss) for one in taken]
        assert run.average is not None
        run.average.update(run.state.params)
        run.save()
        run.checkpoints.wait()
    np.testing.assert_allclose(losses, [6.902868747711182, 6.77418327331543], rtol=1e-4)
    assert any("before checkpoints named their data" in line for line in said)
    assert any("ordered the data otherwise" in line for line in said)
    assert json.loads((run_dir / "checkpoints" / "000000000007" / HOST).read_text())["digests"].keys()
    monkeypatch.chdir(tmp_path)
    for folder, use_average in (("last", False), ("average", True)):
        export(run_dir.name, folder, "bfloat16", use_average=use_average, log=said.append)
        assert load_pretrained(folder)[0] == stored.model


def test_a_checkpoint_of_another_model_is_refused_on_a_mesh_one_of_another_mesh_is_not(
    golden: Path, stored: RunConfig, tmp_path: Path
):
    run_dir = shutil.copytree(golden / "run_0_1", tmp_path / "run")
    same = override(stored, ["parallel.data=2", "parallel.gather=layer"])
    serious, harmless = differences(to_dict(stored), to_dict(same))
    assert not serious
    assert [change.key for change in harmless] == ["parallel.data", "parallel.gather"]
    other = override(same, [f"model.num_layers={stored.model.num_layers + 1}"])
    message = rf"{run_dir} was trained with another configuration:\n  model.num_layers: \d -> \d\nUse another --run-dir"
    opened = open_run(other, run_dir, mesh=make_mesh(other.parallel, jax.devices()[:2]), log=lambda line: None)
    with pytest.raises(UserError, match=message), opened:
        pass


def test_data_made_again_must_be_what_the_run_has_learned_from(run_dir: Path, stored: RunConfig, sources: Path):
    shutil.rmtree(run_dir / "data")
    assert resumed_at(stored, run_dir)[0] == 6
    tokenizer = (run_dir / "tokenizer.json").read_bytes()
    shutil.rmtree(run_dir / "data")
    write_sources(sources, words="QUITE OTHER WORDS")
    for _ in range(2):
        with pytest.raises(UserError, match=r"tokenizer, train, heldout differ.*use another --run-dir"):
            resumed_at(stored, run_dir)
        assert (run_dir / "tokenizer.json").read_bytes() == tokenizer
    assert (run_dir / "checkpoints" / "000000000006" / MANIFEST).is_file()


def test_a_tokenizer_of_another_run_is_not_exported(run_dir: Path, tmp_path: Path):
    (run_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not the tokenizer that this run has learned with"):
        export(run_dir, tmp_path / "out", log=print)


@pytest.mark.parametrize("state", ["lost", "damaged", "a list", "deep", "of another run", "not UTF-8"])
def test_a_config_json_that_is_none_is_restored_from_the_checkpoint(run_dir: Path, stored: RunConfig, state: str):
    path = run_dir / "config.json"
    other = to_dict(override(stored, ["seed=9"]))
    text = {"damaged": b"{", "a list": b"[1]", "deep": b"[" * 10**6, "not UTF-8": b"\xff"}
    path.unlink()
    if state != "lost":
        path.write_bytes(text.get(state, json.dumps(other).encode()))
    with pytest.raises(UserError) as refused:
        resumed_at(override(stored, ["seed=5", "model.ffn_dim=64"]), run_dir)
    assert "model.ffn_dim: 8 -> 64\n  seed: 0 -> 5\n" in str(refused.value)
    assert json.loads(path.read_text()) == to_dict(stored)
    path.unlink()
    step, said = resumed_at(override(stored, ["train.total_tokens=999"]), run_dir)
    assert step == 6
    assert ["restored from" in line for line in said] == [True, False, False]
    assert "changed since the last checkpoint: train.total_tokens: 256 -> 999" in said
    assert json.loads(path.read_text())["train"]["total_tokens"] == 999


def rewrite_host(run_dir: Path, change) -> None:
    """Changes host.json as another version might have written it, under a manifest that agrees."""
    path = run_dir / "checkpoints" / "000000000006"
    host = json.loads((path / HOST).read_text())
    change(host)
    (path / HOST).write_text(json.dumps(host))
    (path / MANIFEST).unlink()
    (path / MANIFEST).write_text(json.dumps(inventory(path)))


def test_fields_added_since_take_their_defaults(run_dir: Path, stored: RunConfig):
    def older(host: dict) -> None:
        for group, name in ((("model",), "latent_norm_eps"), (("train", "output"), "log_every"), ((), "seed")):
            node = host["config"]
            for part in group:
                node = node[part]
            del node[name]

    rewrite_host(run_dir, older)
    assert resumed_at(stored, run_dir)[0] == 6
    config, _ = load_variables(run_dir)
    assert config == to_dict(stored)


def test_fields_of_a_newer_version_are_refused_by_name(run_dir: Path, stored: RunConfig):
    rewrite_host(run_dir, lambda host: host["config"]["train"].update(sharpness=3))
    for use in (lambda: resumed_at(stored, run_dir), lambda: load_variables(run_dir)):
        with pytest.raises(UserError, match=r"unknown field 'train\.sharpness': a newer version"):
            use()


@pytest.mark.parametrize("change", [{"tokens": None}, {"tokens": "1"}, {"tokens": True}, {"data": 3}, {"config": []}])
def test_a_host_json_that_says_nothing_is_refused_in_a_sentence(run_dir: Path, stored: RunConfig, change: dict):
    rewrite_host(run_dir, lambda host: host.update(change))
    with pytest.raises(UserError, match=r"host\.json"):
        resumed_at(stored, run_dir)


def test_config_json_may_be_a_link(run_dir: Path, stored: RunConfig, tmp_path: Path):
    (run_dir / "config.json").rename(tmp_path / "elsewhere.json")
    (run_dir / "config.json").symlink_to(tmp_path / "elsewhere.json")
    resumed_at(override(stored, ["train.total_tokens=999"]), run_dir)
    assert (run_dir / "config.json").is_symlink()
    assert json.loads((tmp_path / "elsewhere.json").read_text())["train"]["total_tokens"] == 999
    assert not list(tmp_path.glob("*.partial"))
