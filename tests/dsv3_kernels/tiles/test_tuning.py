"""The command that writes the tables."""

from dsv3_kernels import tiles
from dsv3_kernels.tiles import tuning


def test_writing_the_modelled_tables_changes_nothing_that_is_modelled(monkeypatch):
    written = {}
    monkeypatch.setattr(tuning, "_write", lambda path, rows: written.update({path.stem: rows}))
    assert tuning.main(["--model"]) == 0
    for kind, name in tiles.FILES.items():
        if all(row["source"] == "modelled" for row in tiles.table(kind)):
            assert written[name] == tiles.table(kind)
