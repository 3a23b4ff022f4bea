import os
import socket
from pathlib import Path

import pytest

from dsv3_jax.data.search import Search


def _search(*given: Path) -> Search:
    search = Search(lambda file: file.suffix == ".txt")
    for path in given:
        if any(mark in path.name or mark in str(path.parent) for mark in "*?["):
            search.add_matches(path)
        else:
            search.add(path)
    return search


def _files(search: Search, root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in search.files]


def _left_out(search: Search) -> dict[str, int]:
    return {why.split()[0]: names.count for why, names in search.left_out.items()}


@pytest.fixture
def tree(tmp_path):
    """Files reached directly, through links to files and folders, in circles, and under two names on the disk."""
    for name in ("in/a/x.txt", "in/b.txt", "in/.hidden/y.txt", "in/c.png", "elsewhere/z.txt", "elsewhere/deep/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    for number in range(3):  # three circles: walked naively, 3**40 folders
        (tmp_path / "in" / "a" / f"loop{number}").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again.txt").symlink_to(tmp_path / "in" / "b.txt")
    os.link(tmp_path / "in" / "b.txt", tmp_path / "in" / "other.txt")
    return tmp_path


@pytest.mark.parametrize("given", ["in", "in/**", "in/**/*", "in/*", "*"])
def test_every_file_is_found_once_through_links_that_lead_in_circles(tree, given):
    search = _search(tree / given)
    assert {file.read_text() for file in search.files} == {
        "in/a/x.txt",
        "in/b.txt",
        "elsewhere/z.txt",
        "elsewhere/deep/w.txt",
    }
    assert len(search.files) == 4
    assert not search.problems


def test_what_is_left_out_is_counted_and_named(tree):
    search = _search(tree / "in")
    assert _files(search, tree / "in") == ["a/x.txt", "again.txt", "linked/deep/w.txt", "linked/z.txt"]
    assert _left_out(search) == {"hidden": 1, "further": 2, "files": 1}
    assert all(names.examples for names in search.left_out.values())


def test_one_file_is_read_once_however_it_is_spelled(tree, monkeypatch):
    monkeypatch.chdir(tree)
    spellings = ["in/b.txt", tree / "in/b.txt", "in/../in/b.txt", "in/again.txt", "in/a/loop1/b.txt", "in/b*"]
    search = _search(*map(Path, spellings), Path("in/other.txt"), tree / "**/b.txt")
    assert search.files == [Path("in/b.txt")]


def test_a_glob_takes_the_folders_it_matches(tree):
    assert _files(_search(tree / "else*"), tree) == ["elsewhere/deep/w.txt", "elsewhere/z.txt"]
    assert _files(_search(tree / "**" / "w.txt"), tree) == ["elsewhere/deep/w.txt"]
    assert not _search(tree / "none*" / "**").files


def test_links_to_nothing_and_things_that_are_no_files_are_named_and_never_opened(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "unmounted").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "python3.13").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.txt"))
    search = _search(tmp_path)
    assert _files(search, tmp_path) == ["a.txt"]
    assert [Path(problem.split()[0]).name for problem in search.problems] == ["gone.txt", "self.txt", "unmounted"]
    assert all("is a link to nothing" in problem for problem in search.problems)
    assert _left_out(search) == {"pipes,": 2, "files": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed cannot be read (Permission denied)" in _search(tmp_path).problems[0]
