"""Files that exist complete or not at all, and only under the name that was given."""

import os
from pathlib import Path

import pytest

from ddim_fast.utils.atomic_files import check_writable, name_beside, own_directory, write_atomically


def test_what_another_process_of_the_same_number_left_behind_is_in_nobodys_way(tmp_path):
    path = tmp_path / "file.json"
    for _ in range(3):  # a container's process is often number 1, in each of its lives
        name_beside(path).write_bytes(b"left behind")
    (tmp_path / f".file.json.{os.getpid()}.part").write_bytes(b"left behind")
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert len({name_beside(path) for _ in range(100)}) == 100


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file.json").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "file.json", b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "file.json").read_bytes() == b"new"
    assert not (tmp_path / "file.json").is_symlink()


def test_where_writing_fails_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("target", ["there", "nothing"])
def test_a_link_is_no_directory_of_its_own(tmp_path, target):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"link must be a directory of its own, got a link to .*: remove the link"):
        own_directory(tmp_path / "link")
    own_directory(tmp_path / "a" / "b")
    own_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    for path, words in {
        tmp_path: "a report must be a file",
        tmp_path / "none" / "r.json": "folder of a report must exist",
        Path("/proc/r.json"): "a report must be writable",
        Path("/dev/null"): "a report must be a file",
    }.items():
        with pytest.raises(ValueError, match=words):
            check_writable("a report", path)
    check_writable("a report", tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    check_writable("a report", tmp_path / "old.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what root, who runs tests, never sees
    with pytest.raises(ValueError, match="which is read-only"):
        check_writable("a report", tmp_path / "old.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
