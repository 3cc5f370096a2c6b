"""Copies into staging memory on several threads."""

import ctypes
import os
import pickle
import signal
import threading
import zlib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from distckpt import DiskSaver
from distckpt._checksum import combine_crc32, kernel_name
from distckpt.ptformat.image import CopyItem
from distckpt.saving.staging import HostMemory, Staging, split_copies, thread_memory
from tests.unit.storages import bytes_of, storages_of

MIB = 1 << 20


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_every_byte_is_copied_to_its_offset(num_threads: int) -> None:
    storages = storages_of(20 * MIB + 3, 5, 9 * MIB)
    copies, at = [], 1000
    for number, storage in enumerate(storages):
        copies.append(CopyItem(number, 0, at, storage.nbytes()))
        at += storage.nbytes() + 77
    memory = HostMemory().view(at - 1000)
    Staging(storages, copies, memory, 1000).run_on(num_threads)
    for one, storage in zip(copies, storages, strict=True):
        assert bytes(memory[one.at - 1000 :][: one.num_bytes]) == bytes_of(storage)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("is_free", [True, False])
def test_bytes_are_checksummed_during_the_copy_if_there_is_a_kernel(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, *, is_free: bool
) -> None:
    if not is_free:
        monkeypatch.setattr("distckpt._checksum.kernel_name", lambda: None)
    elif kernel_name() is None:
        pytest.skip("this machine has no kernel")
    storages = storages_of(9 * MIB + 3, 20)
    copies = split_copies([CopyItem(0, 0, 100, 9 * MIB + 3), CopyItem(1, 5, 10 * MIB, 15)])
    memory = HostMemory().view(11 * MIB)
    one = Staging(storages, copies, memory, 100)
    assert one.checksum_at(10 * MIB) is None
    one.run_on(num_threads)
    if not is_free:
        assert one.checksum_at(100) is None
        return
    assert one.checksum_at(10 * MIB) == (zlib.crc32(bytes_of(storages[1])[5:]), 15)
    parts = [one.checksum_at(at) or (0, 0) for at in (100, 100 + 4 * MIB, 100 + 8 * MIB)]
    assert [num_bytes for _, num_bytes in parts] == [4 * MIB, 4 * MIB, MIB + 3]
    assert combine_crc32(parts) == zlib.crc32(bytes_of(storages[0]))
    for at in (99, 101, 100 + 9 * MIB + 3, 11 * MIB):
        assert one.checksum_at(at) is None, "it is no copy's place"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_small_neighbours_are_copied_in_batches(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr("distckpt.saving.staging._BATCH_ITEMS", 7)
    sizes = [number % 5 * 13 for number in range(40)] + [5 * MIB, 3, 0, 2 * MIB, 2 * MIB, 2 * MIB]
    storages, at, copies = storages_of(*sizes), 0, []
    for number, size in enumerate(sizes):
        copies.append(CopyItem(number, 0, at, size))
        at += size + 1
    items = split_copies(copies)
    assert all(last - first <= 7 for first, last in items.batches)
    assert all(sum(item.num_bytes for item in items[first:last]) <= 4 * MIB for first, last in items.batches)
    assert [index for first, last in items.batches for index in range(first, last)] == list(range(len(items)))
    assert len(items.batches) < len(items) // 3
    assert [last - first for first, last in items.batches_without({items[3].storage})][:2] == [3, 1]
    memory = HostMemory().view(at)
    Staging(storages, items, memory, 0).run_on(num_threads)
    for one, storage in zip(copies, storages, strict=True):
        assert bytes(memory[one.at : one.at + one.num_bytes]) == bytes_of(storage)


def test_wait_for_an_offset_returns_as_soon_as_its_bytes_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    storages = storages_of(10, 10)
    monkeypatch.setattr("distckpt.saving.staging._BATCH_ITEMS", 1)
    staging = Staging(storages, [CopyItem(0, 0, 0, 10), CopyItem(1, 0, 10, 10)], HostMemory().view(20), 0)
    gate, seen = threading.Event(), list[int]()

    def block_the_second(index: int) -> None:
        if index:
            gate.wait(timeout=10.0)

    staging._copy = block_the_second  # type: ignore[method-assign]
    thread = threading.Thread(target=staging.run)
    thread.start()
    staging.wait_until(10)
    seen.append(10)
    gate.set()
    staging.wait_until(None)
    thread.join(timeout=10.0)
    assert seen == [10]


class Overtaken(Staging):
    """The last copy ends on another thread between any two reads of the progress."""

    reads: Iterator[int]

    @property
    def _num_done(self) -> int:
        return next(self.reads)

    @_num_done.setter
    def _num_done(self, value: int) -> None:
        """Ignore the value."""


def test_copy_that_ends_during_a_progress_check_is_counted() -> None:
    staging = Overtaken(storages_of(10), [CopyItem(0, 0, 5, 10)], HostMemory().view(15), 0)
    staging.reads = iter([0, 1, 1])
    staging.wait_until(5)


def test_interrupt_is_raised_after_all_copies_have_ended() -> None:
    staging = Staging(storages_of(10), [CopyItem(0, 0, 0, 10)], HostMemory().view(10), 0)
    began, gate, has_ended = threading.Event(), threading.Event(), threading.Event()

    def copy_slowly(_which: int) -> None:
        began.set()
        gate.wait(timeout=10.0)
        has_ended.set()

    staging._copy = copy_slowly  # type: ignore[assignment, method-assign]
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.4, gate.set).start()
    with pytest.raises(KeyboardInterrupt), staging.running(1):
        began.wait(timeout=10.0)
    assert has_ended.is_set()


def test_error_of_one_thread_is_raised_on_all() -> None:
    copies = [CopyItem(0, 0, 0, 10)]
    staging = Staging(storages_of(10), copies, HostMemory().view(10), 0)

    def fail(index: int) -> None:
        raise ValueError(copies[index].num_bytes)

    staging._copy = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="10"):
        staging.run_on(3)
    with pytest.raises(ValueError, match="10"):
        staging.wait_until(1)


def test_wait_for_a_stopped_copy_raises() -> None:
    staging = Staging(storages_of(10), [CopyItem(0, 0, 0, 10)], HostMemory().view(10), 0)
    staging.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        staging.wait_until(None)


def test_memory_is_page_aligned_and_reused() -> None:
    memory = HostMemory()
    first = memory.view(5000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(first))
    assert address % 4096 == 0
    first[0] = 7
    again = memory.view(4000)
    assert (ctypes.addressof(ctypes.c_char.from_buffer(again)), again[0]) == (address, 7)
    assert len(memory.view(50_000)) == 50_000
    assert first[0] == 7, "who holds a view of what was given back keeps it"
    memory.free()
    assert memory.num_bytes == 0
    assert (deepcopy(memory).num_bytes, pickle.loads(pickle.dumps(memory)).num_bytes) == (0, 0)  # noqa: S301 - ours


def test_savers_share_memory_only_within_a_thread(tmp_path: Path) -> None:
    state = {"a": torch.ones(3 * MIB, dtype=torch.uint8)}
    for name in ("one", "two"):
        DiskSaver(tmp_path / name)(state, "a.pt")
    assert thread_memory().num_bytes >= 3 * MIB
    address = ctypes.addressof(ctypes.c_char.from_buffer(thread_memory().view(1)))
    DiskSaver(tmp_path / "three")(state, "a.pt")
    assert ctypes.addressof(ctypes.c_char.from_buffer(thread_memory().view(1))) == address
    found: list[HostMemory] = []
    thread = threading.Thread(target=lambda: found.append(thread_memory()))
    thread.start()
    thread.join(timeout=10.0)
    assert found[0] is not thread_memory()
