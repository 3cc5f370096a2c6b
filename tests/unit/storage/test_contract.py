"""What every storage has to do; see :class:`distckpt.storage.base.Storage`."""

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt.errors import SaveError
from distckpt.loading.restore import prepare
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.reader import OpenCheckpoint, read_pt
from distckpt.saving.rank_writer import RankWriter, write_file
from distckpt.saving.snapshot import WriteRange
from distckpt.saving.staging import HostMemory
from distckpt.storage.base import Chunk, Storage
from distckpt.storage.local import LocalStorage
from tests.unit.directories import write
from tests.unit.storage.memory import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    (tmp_path / "stored" / "fold0").mkdir(parents=True)
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path / "stored")


def content_of(storage: Storage, name: str) -> bytes:
    with storage.open(name) as file:
        return file.read(0, file.num_bytes + 1)


# -- writing -----------------------------------------------------------------------------------------


def test_a_file_is_invisible_before_its_commit_and_replaces_the_previous_one(storage: Storage) -> None:
    write(storage, "a.pt", b"older")
    for name, before in (("a.pt", [b"older"]), ("b.pt", [])):
        with storage.create(name) as new:
            new.write([Chunk(0, b"newer!")])
            new.sync()
            assert [content_of(storage, one) for one in storage.list() if one == name] == before
            new.commit(6)
            assert content_of(storage, name) == b"newer!"
    assert list(storage.list()) == ["a.pt", "b.pt"]


def test_offsets_may_come_in_any_order(storage: Storage) -> None:
    with storage.create("a.pt") as new:
        new.write([Chunk(10_000, b"tail")])
        new.write([Chunk(0, memoryview(bytearray(b"x" * 9_000)))])
        new.write([Chunk(9_000, b"y" * 1_000)])
        new.write([Chunk(4_000, b"Z")])
        assert new.num_bytes == 10_004
        assert new.read(9_998, 100) == b"yytail"
        new.commit(10_004)
    assert content_of(storage, "a.pt") == b"x" * 4_000 + b"Z" + b"x" * 4_999 + b"y" * 1_000 + b"tail"


def test_many_chunks_are_written_in_one_call(storage: Storage) -> None:
    content = os.urandom(3 * 4096 + 5)
    cuts = (0, 4096, 8192, 8193, 12_000, len(content))
    chunks = [Chunk(begin, memoryview(content)[begin:end]) for begin, end in itertools.pairwise(cuts)]
    with storage.create("a.pt") as new:
        new.write([])
        new.write([*chunks[3:], Chunk(0, b""), *chunks[:3]])
        new.compare([*chunks, Chunk(9_000, b"")])
        new.compare([])
        new.commit(len(content))
    assert content_of(storage, "a.pt") == content


def test_an_aborted_file_is_gone(storage: Storage) -> None:
    with storage.create("a.pt") as new:
        new.write([Chunk(0, b"half")])
    new.abort()
    assert list(storage.list()) == []
    with pytest.raises(FileNotFoundError) as caught:
        storage.join("a.pt", new.token)
    assert isinstance(caught.value, SaveError)


def test_several_writers_join_one_file_and_its_owner_commits(storage: Storage) -> None:
    with storage.create("fold0/a.pt") as new:
        new.allocate(8192)
        for number in range(2):
            with storage.join("fold0/a.pt", new.token) as joined:
                joined.write([Chunk(4096 * number, bytes([number + 1]) * 4096)])
                joined.sync()
            joined.abort()
        new.commit(8192)
    assert content_of(storage, "fold0/a.pt") == b"\1" * 4096 + b"\2" * 4096
    assert list(storage.list()) == []
    assert list(storage.list("fold0")) == ["fold0/a.pt"]


def test_a_commit_of_another_length_fails_and_the_previous_file_stays(storage: Storage) -> None:
    write(storage, "a.pt", b"older")
    with storage.create("a.pt") as new:
        new.write([Chunk(0, b"short")])
        with pytest.raises(SaveError, match=r"/a\.pt"):
            new.commit(6)
    assert content_of(storage, "a.pt") == b"older"


def test_comparing_finds_a_difference(storage: Storage) -> None:
    with storage.create("a.pt") as new:
        new.write([Chunk(0, b"content")])
        new.compare([Chunk(3, b"tent")])
        for data, offset in ((b"Tent", 3), (b"tent", 2), (b"content!", 0)):
            with pytest.raises(SaveError, match=r"/a\.pt.*does not hold what was written"):
                new.compare([Chunk(0, b"con"), Chunk(offset, data), Chunk(0, b"c")])


# -- reading, listing, removing ----------------------------------------------------------------------


def test_a_file_is_read_at_offsets_and_as_a_stream(storage: Storage) -> None:
    write(storage, "a.pt", b"0123456789")
    with storage.open("a.pt") as file:
        memory = memoryview(bytearray(4))
        assert (file.num_bytes, file.read(3, 4), file.read(8, 4), file.read(10, 4)) == (10, b"3456", b"89", b"")
        assert (file.read_into(memory, 7), bytes(memory[:3])) == (3, b"789")
        for _ in range(2):
            assert file.stream().read() == b"0123456789"
        with file.readahead([(0, 10)]) as source:
            assert (source.read_into(memory, 0), bytes(memory), source.read_into(memory, 10)) == (4, b"0123", 0)


def test_an_open_file_keeps_its_bytes_when_the_name_is_replaced_and_removed(storage: Storage) -> None:
    write(storage, "a.pt", b"older")
    with storage.open("a.pt") as file, storage.open("a.pt") as same:
        write(storage, "a.pt", b"newer")
        with storage.open("a.pt") as other:
            assert file.identity() == same.identity() != other.identity()
        storage.remove("a.pt")
        assert (file.read(0, 9), same.read(0, 9)) == (b"older", b"older")
    assert list(storage.list()) == []


@pytest.mark.parametrize("call", ["open", "remove"])
def test_a_missing_file_is_named_with_its_full_path(storage: Storage, call: str) -> None:
    for name in ("a.pt", "fold0/a.pt"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"/{name}")):
            getattr(storage, call)(name)


@pytest.mark.parametrize("name", ["", "/a.pt", "../a.pt", "fold0/../../a.pt", "fold0/", "a\0.pt", ".distckpt-a.tmp"])
def test_a_name_that_points_elsewhere_is_refused(storage: Storage, name: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: storage.create(name),
        lambda: storage.join(name, "1"),
        lambda: storage.open(name),
        lambda: storage.remove(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"filename|is no token"):
            call()


# -- checkpoints -------------------------------------------------------------------------------------


def state(number: int) -> dict[str, Any]:
    return {"weight": torch.full((300, 100), float(number)), "odd": torch.arange(number), "number": number}


def save(storage: Storage, name: str, number: int) -> None:
    manifest = Manifest(versions={}, wall_time_s=0.0)
    write_file(storage, name, state(number), memory=HostMemory(), manifest=manifest, options={})


def load(storage: Storage, name: str) -> int:
    loaded = read_pt(storage.open(name))
    expected = state(loaded["number"])
    assert torch.equal(loaded["weight"], expected["weight"])
    assert torch.equal(loaded["odd"], expected["odd"])
    return int(loaded["number"])


def test_a_checkpoint_is_saved_verified_and_loaded(storage: Storage) -> None:
    save(storage, "a.pt", 1)
    save(storage, "fold0/a.pt", 2)
    assert [load(storage, name) for name in ("a.pt", "fold0/a.pt")] == [1, 2]
    with OpenCheckpoint(storage.open("a.pt")) as file:
        file.verify()
        assert file.head() is not None


def test_two_ranks_write_one_checkpoint_that_is_read_into_live_tensors(storage: Storage) -> None:
    model, twin = torch.nn.Linear(300, 100), torch.nn.Linear(300, 100)
    saved = {"model": model.state_dict()}
    replicas = {one.untyped_storage()._cdata for one in saved["model"].values()}
    manifest = Manifest(versions={}, wall_time_s=0.0)
    writers = [
        RankWriter(
            storage,
            "a.pt",
            manifest=manifest,
            memory=HostMemory(),
            write_range=WriteRange(number, (0, 1)),
            is_coordinator=number == 1,
        )
        for number in range(2)
    ]
    answers = [one.prepare(saved, replicas=lambda: replicas) for one in writers]
    checksums = [one.write(answers[1]["file_token"]) for one in writers]
    assert list(storage.list()) == []
    writers[1].finish(checksums)
    assert list(storage.list()) == ["a.pt"]
    with OpenCheckpoint(storage.open("a.pt")) as file:
        file.verify()
        assert file.read_structure()
        prepare({"model": twin}, file.state(), {}, file).load()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)


def test_another_picklers_checkpoint_is_saved_and_loaded(storage: Storage) -> None:
    manifest, options = Manifest(versions={}, wall_time_s=0.0), {"_use_new_zipfile_serialization": False}
    write_file(storage, "a.pt", state(3), memory=HostMemory(), manifest=manifest, options=options)
    assert load(storage, "a.pt") == 3


@contextlib.contextmanager
def failing(storage: Storage, number: int, patch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Let the storage's n-th call fail; yields what returns how many calls there were."""
    if isinstance(storage, MemoryStorage):
        storage.calls.clear()
        storage.fail_at = number
        yield lambda: len(storage.calls)
        storage.fail_at = None
        return
    calls: list[str] = []

    def failing_call(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        return call

    with patch.context() as here:
        for name in ("open", "pwrite", "fsync", "fstat", "rename", "listdir"):
            here.setattr(os, name, failing_call(name))
        yield lambda: len(calls)


def test_a_failure_of_any_call_leaves_the_previous_checkpoint(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, num_calls, errors = 0, 1, list[OSError]()
    while number <= num_calls:
        number += 1
        save(storage, "a.pt", 1)
        num_errors = len(errors)
        with failing(storage, number, monkeypatch) as count:
            try:
                save(storage, "a.pt", 2)
            except SaveError as error:
                errors.append(error)
        num_calls = count()
        assert load(storage, "a.pt") in ((1, 2) if len(errors) > num_errors else (2,))
        assert list(storage.list()) == ["a.pt"]
        storage.remove("a.pt")
    assert len(errors) >= 4
    assert all("a.pt" in str(error) and error.errno == errno.EIO for error in errors)
