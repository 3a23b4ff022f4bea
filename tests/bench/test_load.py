"""The loading bench: its rows belong together and fit the terminal, and errors are clear."""

from pathlib import Path

import pytest

from dsv3_jax.bench import load


@pytest.mark.slow
def test_there_are_rows_for_loading_and_saving_that_fit_the_terminal(
    golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    folder = golden / "hf" / "tiny_a"
    loading, saving = (measure(folder, "bfloat16", rounds=1) for measure in (load.measure_loading, load.measure_saving))
    assert loading["ratio"].keys() == {"read", "convert"}
    assert saving["ratio"].keys() == {"read", "save"}
    for row in (loading, saving):
        assert all(ratio == row["cpu_s"]["ours"] / row["cpu_s"][peer] for peer, ratio in row["ratio"].items())
    about = {"rounds": 1, "peak_memory_gib": 0.1, "device": "CPU", "cores": 2, "versions": {}, "commit": "0"}
    load._print_table({"rows": [loading, saving], **about})
    out = capsys.readouterr().out
    assert "load as bfloat16" in out
    assert "save as bfloat16" in out
    assert "…" not in out


def test_a_folder_without_weights_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert load.main([str(tmp_path)]) == 2
    assert "no safetensors files" in capsys.readouterr().err
