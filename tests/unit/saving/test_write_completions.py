"""Notes between the ranks that write one file: who waits for them goes on where they do not come."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch.distributed as dist

from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.saving.pending_save import WriteCompletions

CHECKED = [(0, 5, 8), (1, 2**32 - 1, 2**40)]
AS_LISTS = [[0, 5, 8], [1, 2**32 - 1, 2**40]]


@pytest.fixture
def board() -> Iterator[TorchKeyValueStore]:
    made = TorchKeyValueStore(dist.HashStore(), lambda: True, is_guest=True)
    yield made
    made.close()


def receipts(board: Any, save: str = "this") -> WriteCompletions:
    return WriteCompletions(board, "Checkpoint", save)


def word_of(one: WriteCompletions, ranks: Sequence[int], limit_s: float = 0.3) -> Any:
    is_over = threading.Event()
    timer = threading.Timer(limit_s, is_over.set)
    timer.start()
    try:
        return one.collect_checksums(ranks, is_over)
    finally:
        timer.cancel()


def test_word_comes_as_it_was_left_and_is_no_receipt(board: TorchKeyValueStore) -> None:
    one = receipts(board)
    receipts(board).publish_checksums(1, CHECKED)
    receipts(board).publish_checksums(2, [])
    assert word_of(one, [1, 2], 30.0) == [AS_LISTS, []]
    one.cancel()
    assert one.collect([1, 2]) is None


def test_a_receipt_is_no_word_and_of_another_save_neither_counts(board: TorchKeyValueStore) -> None:
    receipts(board).publish(1, CHECKED)
    assert word_of(receipts(board), [1]) is None
    assert receipts(board).collect([1]) == [AS_LISTS]
    receipts(board, "the one before").publish_checksums(1, CHECKED)
    assert word_of(receipts(board), [1]) is None


def test_word_that_comes_late_is_waited_for(board: TorchKeyValueStore) -> None:
    timer = threading.Timer(0.2, lambda: receipts(board).publish_checksums(1, CHECKED))
    timer.start()
    assert word_of(receipts(board), [1], 30.0) == [AS_LISTS]
    timer.join()


def test_who_is_called_off_waits_no_more(board: TorchKeyValueStore) -> None:
    one = receipts(board)
    one.cancel()
    assert word_of(one, [1], 30.0) is None


class Silent:
    """A board that does not answer."""

    looks = 0

    def look(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        self.looks += 1
        msg = f"{keys} within {limit_s} s"
        raise TimeoutError(msg)


def test_a_board_that_does_not_answer_is_asked_once() -> None:
    silent = Silent()
    one = receipts(cast("Any", silent))
    assert word_of(one, [1], 30.0) is None
    assert one.collect([1]) is None
    assert silent.looks == 1
