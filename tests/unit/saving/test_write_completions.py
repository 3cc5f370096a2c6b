"""Notes between the ranks that write one file: a rank that waits for them goes on if they do not come."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch.distributed as dist

from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.saving.pending_save import WriteCompletions

CHECKSUMS = [(0, 5, 8), (1, 2**32 - 1, 2**40)]
AS_LISTS = [[0, 5, 8], [1, 2**32 - 1, 2**40]]


@pytest.fixture
def store() -> Iterator[TorchKeyValueStore]:
    made = TorchKeyValueStore(dist.HashStore(), lambda: True, is_guest=True)
    yield made
    made.close()


def completions(store: Any, save_id: str = "this") -> WriteCompletions:
    return WriteCompletions(store, "Checkpoint", save_id)


def collect_checksums(one: WriteCompletions, ranks: Sequence[int], timeout_s: float = 0.3) -> Any:
    is_written = threading.Event()
    timer = threading.Timer(timeout_s, is_written.set)
    timer.start()
    try:
        return one.collect_checksums(ranks, is_written)
    finally:
        timer.cancel()


def test_checksums_arrive_as_published_and_are_no_completion(store: TorchKeyValueStore) -> None:
    one = completions(store)
    completions(store).publish_checksums(1, CHECKSUMS)
    completions(store).publish_checksums(2, [])
    assert collect_checksums(one, [1, 2], 30.0) == [AS_LISTS, []]
    one.cancel()
    assert one.collect([1, 2]) is None


def test_completion_is_no_publication_of_checksums_and_other_saves_are_ignored(store: TorchKeyValueStore) -> None:
    completions(store).publish(1, CHECKSUMS)
    assert collect_checksums(completions(store), [1]) is None
    assert completions(store).collect([1]) == [AS_LISTS]
    completions(store, "the one before").publish_checksums(1, CHECKSUMS)
    assert collect_checksums(completions(store), [1]) is None


def test_failed_writer_ends_the_wait(store: TorchKeyValueStore) -> None:
    completions(store).publish(1, None)
    assert completions(store).collect([1, 2]) is None


def test_late_checksums_are_waited_for(store: TorchKeyValueStore) -> None:
    timer = threading.Timer(0.2, lambda: completions(store).publish_checksums(1, CHECKSUMS))
    timer.start()
    assert collect_checksums(completions(store), [1], 30.0) == [AS_LISTS]
    timer.join()


def test_cancelled_wait_returns_at_once(store: TorchKeyValueStore) -> None:
    one = completions(store)
    one.cancel()
    assert collect_checksums(one, [1], 30.0) is None


class SilentStore:
    """A key-value store that does not answer."""

    num_calls = 0

    def get_many(self, keys: Sequence[str], *, limit_s: float) -> list[str | None]:
        self.num_calls += 1
        msg = f"{keys} within {limit_s} s"
        raise TimeoutError(msg)


def test_store_that_does_not_answer_is_asked_once() -> None:
    silent = SilentStore()
    one = completions(cast("Any", silent))
    assert collect_checksums(one, [1], 30.0) is None
    assert one.collect([1]) is None
    assert silent.num_calls == 1
