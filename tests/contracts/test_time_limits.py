"""Contract of `Backend`: no wait is for ever, and its end names the ranks that did not come."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from distckpt import CollectiveError, CollectiveTimeout
from distckpt.backends import control_group
from distckpt.backends.base import Backend, default_timeout_s
from distckpt.backends.detect import current
from tests.contracts.implementations import SEVERAL_RANKS, clause
from tests.support import fresh_ranks, job
from tests.support.selection import only_on, process_ranks_only

LIMIT_S = 0.25
SOON_S = 6.0
"""Longer than a limit and the grace that the others get; far shorter than what a hang would be noticed by."""

FORMED = (False, True)
"""Whether the ranks have met before: the first collective forms their group."""

COLLECTIVES: dict[str, Callable[[Backend], object]] = {
    "reduction of ints": lambda backend: backend.all_reduce_ints([1], timeout_s=LIMIT_S),
    "reduction of floats": lambda backend: backend.reduce_host(
        torch.tensor([1.0], dtype=torch.float64), "SUM", what="floats", timeout_s=LIMIT_S
    ),
    "flag": lambda backend: backend.check_in_sync("flag", [1], timeout_s=LIMIT_S),
    "gather": lambda backend: backend.gather_objects("mine", timeout_s=LIMIT_S),
    "broadcast": lambda backend: backend.broadcast_object("mine", timeout_s=LIMIT_S),
    "barrier": lambda backend: backend.barrier(timeout_s=LIMIT_S),
}


def wait_for_note(backend: Backend, key: str) -> None:
    """Wait until the ranks' host group has written something down."""
    board, deadline = backend.key_value_store(), time.monotonic() + 10.0
    assert board is not None
    while board.get_many([key], limit_s=5.0) == [None]:
        assert time.monotonic() < deadline, f"no {key}"
        time.sleep(0.001)


@contextlib.contextmanager
def host_group_with(**constants: float) -> Iterator[None]:
    """Set private constants of the host group: how long it is patient, and what grace the others get."""
    before = {name: getattr(control_group, name) for name in constants}
    vars(control_group).update(constants)
    try:
        yield
    finally:
        vars(control_group).update(before)


def no_grace() -> contextlib.AbstractContextManager[None]:
    """Do not wait for others to write down that they came, where no other will."""
    return host_group_with(_GRACE_S=0.0)


@pytest.mark.parametrize("formed", FORMED, ids=["first", "later"])
@clause(SEVERAL_RANKS)
def test_a_rank_that_never_comes_is_named(backend: Backend, *, formed: bool) -> None:
    absent = backend.world_size - 1
    job.barrier()  # those that come shall not miss each other
    if formed:
        backend.barrier()
    if backend.rank != absent:
        begin = time.monotonic()
        with pytest.raises(CollectiveError, match=f"rank {backend.rank}: .*rank {absent} did not come") as caught:
            backend.barrier(timeout_s=1.0)
        assert time.monotonic() - begin < SOON_S
        assert caught.value.missing == (absent,)
        if backend.world_size == 2:  # among three, the first whose wait ends tells the other
            assert isinstance(caught.value, CollectiveTimeout)
            assert "waited 1 s" in str(caught.value)


@pytest.mark.parametrize("formed", FORMED, ids=["first", "later"])
@pytest.mark.parametrize("what", COLLECTIVES)
@clause([one for one in SEVERAL_RANKS if one.world_size == 2])
def test_every_collective_has_a_limit(backend: Backend, *, what: str, formed: bool) -> None:
    if formed:
        backend.barrier()
    if backend.rank == 1:
        with no_grace(), pytest.raises(CollectiveTimeout) as caught:
            COLLECTIVES[what](backend)
        assert caught.value.missing == (0,)


@clause(SEVERAL_RANKS)
def test_every_rank_that_does_not_come_is_named(backend: Backend) -> None:
    backend.barrier()
    if backend.rank == 1:
        with no_grace(), pytest.raises(CollectiveTimeout) as caught:
            backend.barrier(timeout_s=LIMIT_S)
        assert caught.value.missing == tuple(rank for rank in range(backend.world_size) if rank != 1)


@clause(SEVERAL_RANKS)
def test_what_the_ranks_were_doing_is_in_the_message(backend: Backend) -> None:
    backend.barrier()
    if backend.rank == 0:
        with no_grace(), pytest.raises(CollectiveTimeout, match="in deciding what to save"):
            backend.barrier(what="deciding what to save", timeout_s=LIMIT_S)


@pytest.mark.parametrize("formed", FORMED, ids=["first", "later"])
@clause(SEVERAL_RANKS)
def test_later_collectives_fail_at_once(backend: Backend, *, formed: bool) -> None:
    if formed:
        backend.barrier()
    if backend.rank == 0:
        return
    with no_grace(), pytest.raises(CollectiveError):
        backend.barrier(timeout_s=LIMIT_S)
    for collective in COLLECTIVES.values():
        with pytest.raises(CollectiveError, match="aborted"):  # "waited" is what it says after a wait
            collective(backend)


@pytest.mark.parametrize("formed", FORMED, ids=["first", "later"])
@clause(SEVERAL_RANKS)
def test_a_rank_that_comes_too_late_fails_at_once(backend: Backend, *, formed: bool) -> None:
    late = backend.world_size - 1
    if formed:
        backend.barrier()
    if backend.rank != late:
        with no_grace(), pytest.raises(CollectiveError):
            backend.barrier(timeout_s=LIMIT_S)
        job.store().set(f"gave up/{backend.rank}", "1")
        return
    job.store().wait([f"gave up/{rank}" for rank in range(late)], timedelta(seconds=20))
    begin = time.monotonic()
    with pytest.raises(CollectiveError):
        backend.barrier(timeout_s=LIMIT_S)
    assert time.monotonic() - begin < SOON_S


@clause(SEVERAL_RANKS)
def test_nobody_succeeds_alone_at_the_end_of_a_limit(backend: Backend) -> None:
    backend.barrier()
    if backend.rank == 0:
        with pytest.raises(CollectiveTimeout):
            backend.barrier(timeout_s=LIMIT_S)
    else:  # come at the moment when rank 0 gives up
        wait_for_note(backend, "control/abort")
        with pytest.raises(CollectiveError):
            backend.barrier(timeout_s=LIMIT_S)


@clause(SEVERAL_RANKS)
def test_a_rank_that_comes_late_but_in_time_is_waited_for(backend: Backend) -> None:
    backend.barrier()
    with host_group_with(_PATIENCE_S=0.02):
        if backend.rank == 1:  # comes once rank 0 has begun to wonder, and written down that it came itself
            number = backend._control_group._num_operations + 1  # type: ignore[attr-defined]  # notes are kept under it
            wait_for_note(backend, f"control/arrived/{number}/0")
        assert backend.all_reduce_ints([1], timeout_s=20.0) == [backend.world_size]


@only_on("gloo", "xla", why="takes three ranks, of which Horovod's job has two here")
@clause([one for one in SEVERAL_RANKS if one.world_size == 3])
def test_the_shortest_limit_ends_the_wait_of_all(backend: Backend) -> None:
    backend.barrier()
    begin = time.monotonic()
    if backend.rank < 2:
        with pytest.raises(CollectiveError) as caught:
            backend.barrier(timeout_s=LIMIT_S if backend.rank == 0 else 60.0)
        assert caught.value.missing == (2,)
        assert time.monotonic() - begin < SOON_S


@clause(SEVERAL_RANKS)
def test_environment_sets_the_limit(backend: Backend) -> None:
    backend.barrier()
    if backend.rank == 0:
        os.environ["DISTCKPT_TIMEOUT_S"] = "0.25"
        with no_grace(), pytest.raises(CollectiveTimeout, match=r"waited 0\.25 s"):
            backend.barrier()


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "soon"])
def test_a_limit_that_is_no_positive_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCKPT_TIMEOUT_S", text)
    with pytest.raises(ValueError, match="DISTCKPT_TIMEOUT_S should be a positive number of seconds, but is"):
        default_timeout_s()


def test_limit_is_five_minutes_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTCKPT_TIMEOUT_S", raising=False)
    assert default_timeout_s() == 300.0


def _last_rank_dies() -> tuple[int, ...]:
    backend = current()
    backend.barrier()
    if backend.rank == backend.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(CollectiveError, match="barrier") as caught:
        backend.barrier(timeout_s=30.0)
    assert time.monotonic() - begin < 10.0, "noticed by the broken connection, long before the limit"
    begin = time.monotonic()
    with pytest.raises(CollectiveError, match="aborted"):
        backend.gather_objects(None, timeout_s=30.0)
    assert time.monotonic() - begin < SOON_S
    return caught.value.missing


@process_ranks_only
def test_a_rank_that_dies_is_named_by_the_survivors() -> None:
    with fresh_ranks(_last_rank_dies, 3) as ranks:
        ends = ranks.finish(may_fail=[2])
    assert ends[2].exit_code == -signal.SIGKILL
    assert [end.value for end in ends[:2]] == [(2,), (2,)]
