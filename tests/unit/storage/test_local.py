"""A directory in which a file appears whole and durable, or not at all."""

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distckpt.errors import SaveError
from distckpt.storage import new_file
from distckpt.storage.base import Chunk
from distckpt.storage.local import LocalStorage, make_directory
from tests.unit.directories import names_in, open_files_below, write

DEAD = f".distckpt-{new_file._host_tag()}-1-dead.tmp"
FOREIGN = ".distckpt-ffffffff-1-foreign.tmp"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were synced, in order."""
    paths: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115 - a descriptor's path
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    return paths


# -- writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("atomic", [True, False])
def test_a_file_that_was_begun_can_be_joined_and_is_its_makers(tmp_path: Path, *, atomic: bool) -> None:
    with LocalStorage(tmp_path, atomic=atomic).create("a.pt") as new:
        new.allocate(8)
        with LocalStorage(tmp_path).join("a.pt", new.token) as joined:
            joined.write([Chunk(4, b"half")])
            joined.sync()
        new.write([Chunk(0, b"one ")])
        assert names_in(tmp_path) == [new.token]
        new.commit(8)
    assert (tmp_path / "a.pt").read_bytes() == b"one half"
    assert open_files_below(tmp_path) == []


def test_what_was_not_begun_for_it_cannot_be_joined(tmp_path: Path) -> None:
    (tmp_path / "b.pt").touch()
    (tmp_path / "c.pt").symlink_to("b.pt")
    for begun in ("b.pt", "../b.pt", "c.pt", ".distckpt-0-0-0.tmp/../b.pt"):
        with pytest.raises(ValueError, match=r"is no token of a new file|symlink"):
            LocalStorage(tmp_path).join("c.pt" if begun == "c.pt" else "a.pt", begun)
    with pytest.raises(FileNotFoundError, match=r"temporary file .* cannot be opened"):
        LocalStorage(tmp_path).join("a.pt", DEAD)
    assert open_files_below(tmp_path) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_a_written_file_holds_the_content_and_nothing_else_is_left(tmp_path: Path, *, atomic: bool) -> None:
    write(LocalStorage(tmp_path, atomic=atomic), "a.pt", b"content")
    assert (tmp_path / "a.pt").read_bytes() == b"content"
    assert names_in(tmp_path) == ["a.pt"]
    assert open_files_below(tmp_path) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_an_older_file_of_the_name_is_replaced(tmp_path: Path, *, atomic: bool) -> None:
    (tmp_path / "a.pt").write_bytes(b"a much longer older content")
    write(LocalStorage(tmp_path, atomic=atomic), "a.pt", b"new")
    assert (tmp_path / "a.pt").read_bytes() == b"new"


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664), (0, 0o666)])
def test_permissions_are_those_that_the_umask_gives(
    tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int, *, atomic: bool
) -> None:
    umask(mask)
    write(LocalStorage(tmp_path, atomic=atomic), "a.pt", b"")
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == mode


def test_a_sub_folder_that_exists_is_written_to(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "fold0").mkdir()
    write(LocalStorage(tmp_path), "fold0/./a.pt", b"content")
    assert names_in(tmp_path / "fold0") == ["a.pt"]
    assert synced[-1] == str(tmp_path / "fold0")


def test_the_file_is_synced_under_its_temporary_name_and_then_the_directory(tmp_path: Path, synced: list[str]) -> None:
    write(LocalStorage(tmp_path), "a.pt", b"content")
    temp, directory = synced
    assert Path(temp).name.startswith(".distckpt-")
    assert directory == str(tmp_path)


def test_a_file_in_place_is_synced_too(tmp_path: Path, synced: list[str]) -> None:
    write(LocalStorage(tmp_path, atomic=False), "a.pt", b"content")
    assert synced == [str(tmp_path / "a.pt"), str(tmp_path)]


def test_a_directory_that_is_a_link_itself_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(LocalStorage(tmp_path / "link"), "a.pt", b"content")
    assert names_in(tmp_path / "real") == ["a.pt"]


# -- the temporary file ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_temporary_file_is_never_one_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _n: "same")
    squatter = tmp_path / f".distckpt-{new_file._host_tag()}-{os.getpid()}-same.tmp"
    (tmp_path / "another's").write_bytes(b"another's")
    if kind == "file":
        squatter.write_bytes(b"another's")
    else:
        squatter.symlink_to("another's")
    with squatter.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # by a living process, so that it is not cleared
        with pytest.raises(SaveError, match="EEXIST") as caught:
            write(LocalStorage(tmp_path), "a.pt", b"content")
    assert isinstance(caught.value, FileExistsError)
    assert squatter.read_bytes() == (tmp_path / "another's").read_bytes() == b"another's"


def test_a_dead_processs_temporary_file_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / DEAD).touch()
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == ["a.pt"]


def test_a_living_processs_temporary_file_is_not_cleared(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with storage.create("a.pt") as new:
        new.write([Chunk(0, b"first half, ")])
        write(storage, "b.pt", b"another save")  # which clears what is dead
        new.write([Chunk(12, b"second half")])
        new.commit(23)
    assert (tmp_path / "a.pt").read_bytes() == b"first half, second half"
    assert names_in(tmp_path) == ["a.pt", "b.pt"]


def test_another_hosts_fresh_temporary_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FOREIGN).touch()
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == [FOREIGN, "a.pt"]


def test_another_hosts_stale_temporary_file_is_cleared(tmp_path: Path) -> None:
    (tmp_path / FOREIGN).touch()
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / FOREIGN, (an_hour_ago, an_hour_ago))
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == ["a.pt"]


def test_what_only_looks_like_a_temporary_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / DEAD).mkdir()
    (tmp_path / DEAD.replace("dead", "link")).symlink_to("kept.pt")
    (tmp_path / "kept.pt").touch()
    os.mkfifo(tmp_path / DEAD.replace("dead", "pipe"))
    before = names_in(tmp_path)
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == sorted([*before, "a.pt"])


def test_a_temporary_file_taken_for_a_dead_ones_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    stolen: list[Path] = []

    def steal_the_first(fd: int, operation: int) -> None:
        if not stolen:
            stolen.extend(tmp_path.iterdir())
            stolen[0].unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", steal_the_first)
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert stolen
    assert names_in(tmp_path) == ["a.pt"]
    assert open_files_below(tmp_path) == []


def test_a_file_system_without_locks_is_written_to_and_clears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / DEAD).touch()
    write(LocalStorage(tmp_path), "a.pt", b"content")
    assert names_in(tmp_path) == [DEAD, "a.pt"]


# -- removing ----------------------------------------------------------------------------------------


def test_removing_takes_the_one_file(tmp_path: Path) -> None:
    (tmp_path / "fold0").mkdir()
    for name in ("a.pt", "b.pt", "fold0/a.pt"):
        (tmp_path / name).touch()
    LocalStorage(tmp_path).remove("a.pt")
    LocalStorage(tmp_path).remove("fold0/a.pt")
    assert names_in(tmp_path) == ["b.pt", "fold0"]
    assert names_in(tmp_path / "fold0") == []


def test_removing_a_missing_file_is_a_file_not_found_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        LocalStorage(tmp_path).remove("a.pt")
    assert caught.value.filename == str(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["link.pt", "dangling.pt", "folder/a.pt"])
def test_a_symlink_in_the_way_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "a.pt").write_bytes(b"outside")
    for link, target in {"link.pt": "../a.pt", "dangling.pt": "../b.pt", "folder": ".."}.items():
        (place / link).symlink_to(target)
    for atomic in (True, False):
        with pytest.raises(ValueError, match="a symlink"):
            write(LocalStorage(place, atomic=atomic), name, b"new")
    with pytest.raises(ValueError, match="a symlink"):
        LocalStorage(place).remove(name)
    assert names_in(place) == ["dangling.pt", "folder", "link.pt"]
    assert names_in(tmp_path) == ["a.pt", "place"]
    assert (tmp_path / "a.pt").read_bytes() == b"outside"


# -- making ------------------------------------------------------------------------------------------


def test_each_made_directory_is_synced_into_its_parent(tmp_path: Path, synced: list[str]) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


def test_a_relative_directory_is_made_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_directory(Path("a/b"))
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_making_a_directory_that_exists_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    make_directory(tmp_path)
    assert names_in(tmp_path) == ["a.pt"]


def test_making_a_directory_below_a_file_is_a_not_a_directory_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file" / "a")


def test_made_directories_have_the_permissions_that_the_umask_gives(
    tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(0o077)
    make_directory(tmp_path / "a" / "b")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]


def test_a_file_that_is_written_in_place_lets_go_of_its_other_names(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.pt").hardlink_to(outside)
    os.mkfifo(folder / "b.pt")
    for name in ("a.pt", "b.pt"):
        write(LocalStorage(folder, atomic=False), name, b"new")
        assert (folder / name).read_bytes() == b"new"
    assert outside.read_bytes() == b"precious"
