"""Memory that ranks share: what is written whole is read whole, and a rank that has left is not waited for."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from distckpt.backends.shared_memory import NUM_WORDS, ROOM_BYTES, SharedMemory, create_offer

LIMIT = timedelta(seconds=5)


@pytest.fixture
def ranks() -> Iterator[list[SharedMemory]]:
    """Return the memory as three ranks of one process see it."""
    own, offer = create_offer(3)
    assert own is not None
    joined = [SharedMemory.join(own if rank == 0 else create_offer(3)[0], [offer] * 3, rank) for rank in range(3)]
    found = [memory for memory in joined if memory is not None]
    assert len(found) == 3
    yield found
    for memory in found:
        memory.close()


def words(*first: int) -> list[int]:
    return [*first, *[0] * (NUM_WORDS - len(first))]


def test_the_largest_of_all_ranks_is_found(ranks: list[SharedMemory]) -> None:
    brought = [words(1, -5, 2**62), words(7, -9, 0), words(3, -(2**62), 2**62 + 1)]
    for number in range(1, 20):  # more operations than are kept
        works = [memory.start_max(number, values) for memory, values in zip(ranks, brought, strict=True)]
        for work in works:
            work.wait(LIMIT)
            assert work.is_completed()
            assert work.values == words(7, -5, 2**62 + 1)


def test_a_rank_that_has_not_come_is_waited_for_no_longer_than_told(ranks: list[SharedMemory]) -> None:
    work = ranks[0].start_max(1, words(1))
    ranks[1].start_max(1, words(2))
    begin_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"\[2\] did not come within 0.2 s"):
        work.wait(timedelta(seconds=0.2))
    assert 0.2 <= time.monotonic() - begin_s < 20.0
    assert not work.is_completed()
    ranks[2].start_max(1, words(3))
    work.wait(LIMIT)
    assert work.values == words(3)


def test_a_rank_may_begin_the_next_operation_before_a_slow_one_has_read(ranks: list[SharedMemory]) -> None:
    first = [memory.start_max(1, words(rank)) for rank, memory in enumerate(ranks)]
    first[0].wait(LIMIT)
    second = ranks[0].start_max(2, words(9))
    for work in first[1:]:
        work.wait(LIMIT)
        assert work.values == words(2)
    for memory in ranks[1:]:
        memory.start_max(2, words(1))
    second.wait(LIMIT)
    assert second.values == words(9)


def test_numbers_that_are_half_written_are_not_read(ranks: list[SharedMemory]) -> None:
    work = ranks[0].start_max(1, words(1))
    ranks[1].start_max(1, words(2))
    ranks[2].start_max(1, words(3))
    memory = ranks[2]._memory
    at = ranks[2]._offset(2, 1)
    whole = memory[at : at + 8 * (NUM_WORDS + 2)]
    for seed in range(200):
        chance = random.Random(seed)
        torn = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            torn[8 * chance.randrange(1, NUM_WORDS + 2) + chance.randrange(8)] ^= chance.randrange(1, 256)
        memory[at : at + len(torn)] = bytes(torn)
        assert ranks[0].read(2, 1) in (None, tuple(words(3)))
    memory[at : at + 8] = struct.pack("<q", 5)  # another operation's
    assert ranks[0].read(2, 1) is None
    memory[at : at + len(whole)] = whole
    work.wait(LIMIT)
    assert work.values == words(3)


def test_every_rank_gets_what_each_has_brought(ranks: list[SharedMemory]) -> None:
    lengths = [0, 1, 127, 128, ROOM_BYTES - 1, ROOM_BYTES]
    for number in range(1, 20):  # more operations than are kept
        brought = [os.urandom(lengths[(number + rank) % len(lengths)]) for rank in range(3)]
        works = [memory.start_gather(number, data) for memory, data in zip(ranks, brought, strict=True)]
        for work in works:
            work.wait(LIMIT)
            assert [work.by_rank[rank] for rank in range(3)] == brought
    with pytest.raises(ValueError, match=f"{ROOM_BYTES + 1} bytes, but there is room for {ROOM_BYTES}"):
        ranks[0].start_gather(20, bytes(ROOM_BYTES + 1))


def test_bytes_that_are_half_written_are_not_read(ranks: list[SharedMemory]) -> None:
    data = bytes(range(1, 256)) * 16 + bytes([7]) * 16  # none of them 0
    assert len(data) == ROOM_BYTES
    work = ranks[0].start_gather(1, b"")
    ranks[1].start_gather(1, b"")
    ranks[2].start_gather(1, data)
    memory = ranks[2]._memory
    at = ranks[2]._offset(2, 1) + 128
    for there in (0, 1, 2000, ROOM_BYTES - 1):  # of the bytes; the others are another operation's still
        memory[at + there : at + ROOM_BYTES] = bytes(ROOM_BYTES - there)
        assert ranks[0].read_bytes(2, 1) is None
        assert not work.is_done()
        memory[at : at + ROOM_BYTES] = data
    work.wait(LIMIT)
    assert work.by_rank[2] == data


def test_a_rank_that_has_left_ends_the_waiting_but_not_what_it_wrote_before(ranks: list[SharedMemory]) -> None:
    works = [memory.start_max(1, words(rank)) for rank, memory in enumerate(ranks)]
    ranks[2].close()
    works[0].wait(LIMIT)
    assert works[0].values == words(2)
    again = ranks[0].start_max(2, words(0))
    ranks[1].start_max(2, words(0))
    begin_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks \[2\] have left"):
        again.wait(timedelta(seconds=30))
    assert time.monotonic() - begin_s < 20.0
    assert again.is_completed(), "it has ended, though not well"
    with pytest.raises(RuntimeError, match=r"ranks \[2\] have left"):
        again.wait()


def test_a_forked_process_that_ends_is_not_the_rank_that_leaves(ranks: list[SharedMemory]) -> None:
    child = os.fork()
    if child == 0:
        ranks[2].close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert ranks[0].find_lost([1, 2]) == []
    ranks[2].close()
    assert ranks[0].find_lost([1, 2]) == [2]


def test_a_process_that_ended_is_not_waited_for() -> None:
    own, _ = create_offer(2)
    assert own is not None
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own.attach(0, [os.getpid(), other.pid])
    try:
        work = own.start_max(1, words(1))
        with pytest.raises(RuntimeError, match="did not come"):
            work.wait(timedelta(seconds=0.1))
        other.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] have left, or their processes have ended"):
            work.wait(timedelta(seconds=30))
    finally:
        other.kill()
        other.wait()
        own.close()


def test_ranks_on_two_machines_share_none() -> None:
    own, offer = create_offer(2)
    other = offer.replace(b'"boot": "', b'"boot": "elsewhere-')
    assert other != offer
    assert SharedMemory.join(own, [offer, other], 0) is None
    assert SharedMemory.join(create_offer(2)[0], [offer, b"{}"], 0) is None
    assert SharedMemory.join(None, [offer, offer], 1) is None


def test_nothing_stays_open() -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = num_open()
    for _ in range(20):
        own, offer = create_offer(2)
        memory = SharedMemory.join(own, [offer, offer], 0)
        assert memory is not None
        memory.start_max(1, words(1))
        del own, memory  # forgotten without a word, as with a process group that is destroyed
    assert num_open() == before
