import contextlib
import logging
import os
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from runtime.files import find_files, lock_folder, quiet_hub, write_text


def test_a_locked_folder_is_refused_to_a_second_process_until_the_first_one_ends(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "other_process.py"), "hold_lock", str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ValueError, match=r"another process is at work in .*; wait for it"):
            lock_folder(tmp_path, False, "wait for it")
        assert os.listdir("/proc/self/fd") == before  # no descriptor is left open
    finally:
        holder.kill()
        holder.communicate()
    lock_folder(tmp_path, False, "wait for it")


def test_a_file_is_written_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old"
    write_text(tmp_path / "x.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "new"


def test_a_link_is_followed_and_a_device_is_not_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "far" / "file.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "far" / "file.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(OSError, match=r"pipe\.txt is not a file that can be replaced"):
        write_text(tmp_path / "pipe.txt", "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe.txt").st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"far", "link.txt", "pipe.txt"}


def test_links_in_a_circle_give_each_file_once(tmp_path):
    for name in ("a/1.JPG", "a/b/2.gif", "a/b/notes.txt", "c/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/link.png").symlink_to(tmp_path / "c/3.png")
    names = (".jpg", ".gif", ".png")
    found = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path / "a", names, apart_from=tmp_path)]
    assert found == ["a/1.JPG", "a/link.png", "a/b/2.gif"]
    assert len(find_files(tmp_path, names)) == 3


class Entry:
    """An entry of a folder on a file system that has the same inode for all, as FUSE's do."""

    def __init__(self, entry):
        self.entry = entry

    def __getattr__(self, name):
        return getattr(self.entry, name)

    def inode(self):
        return 0xFFFFFFFF


def test_files_are_told_apart_where_listing_gives_no_inodes_and_a_hard_link_is_one_file(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    os.link(tmp_path / "a.png", tmp_path / "c.png")
    expected = [tmp_path / "a.png", tmp_path / "b.png"]
    assert find_files(tmp_path, (".png",)) == expected
    scandir = os.scandir

    @contextlib.contextmanager
    def without_inodes(path):
        with scandir(path) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", without_inodes)
    assert find_files(tmp_path, (".png",)) == expected


def test_what_is_fetched_from_the_hub_is_told_and_its_client_is_silent_about_retries(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    client = logging.getLogger("huggingface_hub.utils._http")
    with quiet_hub("owner/name"):
        client.warning("Retrying in 1s")
    assert not caplog.records
    client.warning("Retrying in 1s")
    assert len(caplog.records) == 1
    assert capsys.readouterr().out == "Fetching owner/name from the hub\n"
    (tmp_path / "models--owner--name/snapshots").mkdir(parents=True)
    with quiet_hub("owner/name"):
        assert capsys.readouterr().out == ""
