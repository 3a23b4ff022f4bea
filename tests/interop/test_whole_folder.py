"""A folder is replaced whole or not at all, wherever its name leads, and nothing is left behind."""

import os
from pathlib import Path

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.interop import whole_folder
from dsv3_jax.interop.safetensors_io import CheckpointError
from dsv3_jax.interop.whole_folder import replaced, resolve, write_bytes


def write(name: str | Path, text: str = "new", size: int = 10) -> None:
    with replaced(resolve(name), size=size, is_ours=lambda folder: (folder / "config.json").exists()) as folder:
        write_bytes(folder / "config.json", text.encode())
        write_bytes(folder / "weights", text.encode())


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below, hidden ones too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty folder"
    return found


WHOLE = {"disk/export/config.json": "new", "disk/export/weights": "new"}
NAMES = {
    "a new folder": ("disk/export", {}),
    "new parents": ("disk/a/b/export", {}),
    "with a slash": ("disk/export/", {}),
    "through dots": ("disk/../disk/./export", {}),
    "a link": ("latest", {"latest": "disk/export"}),
    "an absolute link": ("latest", {"latest": "ROOT/disk/export"}),
    "a link to a link": ("latest", {"latest": "second", "second": "disk/export"}),
    "a link with a slash": ("latest/", {"latest": "disk/export"}),
    "a parent that is a link": ("place/export", {"place": "disk"}),
    "a link in a linked folder": ("place/latest", {"place": "disk", "disk/latest": "export"}),
    "a link to nothing yet, below nothing yet": ("latest", {"latest": "disk/a/b/export"}),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_name_leads_to_its_folder_and_links_stay(tmp_path, monkeypatch, case, before):
    name, links = NAMES[case]
    (tmp_path / "disk").mkdir()
    for link, target in links.items():
        (tmp_path / link).symlink_to(target.replace("ROOT", str(tmp_path)))
    end = tmp_path / ("disk/a/b/export" if "/a/b/" in (links.get("latest", name)) else "disk/export")
    if before != "nothing":
        end.mkdir(parents=True)
    if before == "old":
        (end / "old").write_text("old")
    monkeypatch.chdir(tmp_path)
    write(name)
    expected = {link: f"-> {target.replace('ROOT', str(tmp_path))}" for link, target in links.items()}
    place = end.relative_to(tmp_path).as_posix()
    assert tree(tmp_path) == {**expected, f"{place}/config.json": "new", f"{place}/weights": "new"}


@pytest.mark.parametrize("before", ["empty", "old"])
def test_the_current_folder_gets_new_contents_in_its_place(tmp_path, monkeypatch, before):
    if before == "old":
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "config.json").write_text("old")
        (tmp_path / "config.json").write_text("old")
    monkeypatch.chdir(tmp_path)
    write(".")
    assert {path.name: path.read_text() for path in Path(".").iterdir()} == {"config.json": "new", "weights": "new"}
    write(tmp_path, "newer")
    assert Path("weights").read_text() == "newer"


REFUSED = {
    "empty": ("", "a path is empty"),
    "zero byte": ("a\0b", "leave out the zero byte"),
    "half a surrogate pair": ("a\ud800", "cannot be"),
    "too long": ("x" * 300, "cannot be made|cannot be looked at"),
    "a link to itself": ("loop", "leads back to itself"),
    "below a link to itself": ("loop/export", "cannot be made"),
    "below a file": ("file/a/export", "cannot be made"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, monkeypatch, case):
    name, reason = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").write_text("file")
    with pytest.raises((ConfigError, CheckpointError), match=reason) as caught:
        write(name)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file": "file", "loop": "-> loop"}


def test_the_longest_name_can_be_written(tmp_path):
    write(tmp_path / ("x" * 255))
    write(tmp_path / ("ü" * 127), "new")
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["x", "ü"]


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("failing", ["rename", "fsync", "open"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_what_was_there(tmp_path, monkeypatch, stays, failing, error):
    """The first, second, ... call of what can fail does, until there is none left."""
    folder = tmp_path / "export"
    write(folder, "old")
    if stays:
        monkeypatch.chdir(folder)
    before = tree(tmp_path)
    owner = {"rename": Path, "fsync": os, "open": Path}[failing]
    genuine = getattr(owner, failing)
    for allowed in range(20):
        calls = iter(range(100))

        def fail_once(*arguments, calls=calls, allowed=allowed, **named):
            if next(calls) == allowed:
                raise error
            return genuine(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, failing, fail_once)
            try:
                write(folder, "new")
                break
            except (CheckpointError, KeyboardInterrupt):
                pass
        after = tree(tmp_path)
        in_place = failing == "fsync" and set(after.values()) == {"new"}  # stopped at the very last call
        assert in_place or after == before
    assert allowed > 0
    assert tree(tmp_path) == dict.fromkeys(before, "new")


def test_new_parents_go_when_writing_fails(tmp_path):
    with pytest.raises(CheckpointError, match="needs 1,000,000,000,000,000,000 bytes"):
        write(tmp_path / "a" / "b" / "export", size=10**18)
    assert tree(tmp_path) == {}


def test_a_full_disk_names_what_killed_exports_left_and_nothing_else(tmp_path):
    for name in (".export.partial-a1", ".other.old-b2", ".export.partial-not_ours", "visible.old-c3", ".cache"):
        (tmp_path / name).mkdir()
        if "not_ours" not in name:
            (tmp_path / name / "config.json").write_text("x" * 1234)
    (tmp_path / ".file.partial-d4").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "export", size=10**18)
    left = f"{tmp_path}/.export.partial-a1 (1,234 bytes), {tmp_path}/.other.old-b2 (1,234 bytes)"
    assert str(caught.value).endswith(
        f"exports that were killed left {left}: delete what no running export is writing."
    )


def test_permissions_are_those_of_a_new_folder(tmp_path):
    write(tmp_path / "export")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "export").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert whole_folder.PARTIAL not in "".join(os.listdir(tmp_path))
