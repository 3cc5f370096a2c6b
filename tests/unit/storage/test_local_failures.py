"""A directory on which something fails: the error says what, where and why, and what was there stays."""

import contextlib
import errno
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import CommitNotDurable, SaveError
from distckpt.storage.base import Chunk
from distckpt.storage.local import LocalStorage
from tests.unit.directories import names_in, open_files_below, write

NOBODY = 65534


@pytest.mark.parametrize("error", [ValueError("unpicklable"), KeyboardInterrupt()])
def test_a_save_that_fails_before_its_commit_leaves_what_was_there_before(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.pt").write_bytes(b"older")

    def fail() -> None:
        with LocalStorage(tmp_path).create("a.pt") as new:
            new.write([Chunk(0, b"half")])
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names_in(tmp_path) == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == b"older"
    assert open_files_below(tmp_path) == []


def test_a_vanished_directory_is_a_file_not_found_error_that_names_it(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError, match=re.escape(f"directory {gone} cannot be opened (ENOENT")) as caught:
        write(LocalStorage(gone), "a.pt", b"")
    assert isinstance(caught.value, SaveError)
    assert caught.value.errno == errno.ENOENT


def test_a_missing_sub_folder_is_a_file_not_found_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"directory {tmp_path / 'fold0'} cannot be opened (ENOENT")):
        write(LocalStorage(tmp_path), "fold0/a.pt", b"")


@pytest.mark.parametrize("name", ["file", "file/a.pt"])
def test_a_file_where_a_directory_should_be_is_a_not_a_directory_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    storage = LocalStorage(tmp_path / "file") if name == "file" else LocalStorage(tmp_path)
    with pytest.raises(NotADirectoryError, match="ENOTDIR"):
        write(storage, "a.pt" if name == "file" else name, b"")


def test_a_directory_of_the_files_name_is_an_is_a_directory_error(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(IsADirectoryError, match="EISDIR"):
        write(LocalStorage(tmp_path), "a.pt", b"")
    assert names_in(tmp_path) == ["a.pt"]


def test_a_failed_rename_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(SaveError, match=re.escape(str(tmp_path))):
        write(LocalStorage(tmp_path), "a.pt", b"")


def test_a_forbidden_directory_is_a_permission_error() -> None:
    # Not tmp_path, which its parents keep from everybody but its owner.
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name) / "forbidden"
        directory.mkdir(mode=0o555)
        Path(name).chmod(0o755)
        if os.geteuid() == 0:  # root may everything
            os.seteuid(NOBODY)
            stack.callback(os.seteuid, 0)
        with pytest.raises(PermissionError, match=re.escape(f"created in {directory} (EACCES")) as caught:
            write(LocalStorage(directory), "a.pt", b"")
    assert isinstance(caught.value, SaveError)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    _fail_syncing_directories(monkeypatch, code)
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == ["a.pt"]


def test_a_failed_sync_of_the_directory_is_reported_as_a_commit_that_may_not_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_syncing_directories(monkeypatch, errno.EIO)
    with pytest.raises(CommitNotDurable, match="may not survive a power cut") as caught:
        write(LocalStorage(tmp_path), "a.pt", b"content")
    assert str(tmp_path / "a.pt") in str(caught.value)
    assert (tmp_path / "a.pt").read_bytes() == b"content"


def _fail_syncing_directories(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)


def test_a_file_system_that_lies_about_what_it_took_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset) and len(data))
    with pytest.raises(SaveError, match="reported 7 bytes written, but holds 3"):
        write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == []


def test_a_failing_look_at_the_temporary_file_leaves_neither_it_nor_an_open_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Left open, its lock would keep it for as long as this process lives: no later save could clear it.
    _fail_once(monkeypatch, "fstat")
    with pytest.raises(SaveError, match="EIO"):
        write(LocalStorage(tmp_path), "a.pt", b"content")
    assert open_files_below(tmp_path) == []
    assert names_in(tmp_path) == []


def test_a_close_that_reports_an_error_does_not_make_a_failure_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def close_and_fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close_and_fail)
    write(LocalStorage(tmp_path), "a.pt", b"content")
    monkeypatch.undo()
    assert (tmp_path / "a.pt").read_bytes() == b"content"


def _fail_once(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    original: Any = getattr(os, function)
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fail(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args, **kwargs)

    monkeypatch.setattr(os, function, fail)
