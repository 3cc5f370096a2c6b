"""Ranks of a test's own: killed, stopped, exiting and wrapped, as `tests.support.fresh` promises."""

import os
import signal
import threading

import pytest
import torch.distributed as dist

from tests.support import RankFailedError, fresh_ranks, run_ranks, send_to_parent


def _pid() -> int:
    return os.getpid()


def _rank_squared() -> int:
    return dist.get_rank() ** 2


def test_fresh_ranks_return_results_too() -> None:
    assert run_ranks(_rank_squared, 2, fresh=True) == [0, 1]


def _tells_and_waits() -> None:
    send_to_parent({"rank": dist.get_rank()})
    if dist.get_rank() == 1:
        threading.Event().wait()
    with pytest.raises(RuntimeError):
        dist.barrier()


def test_a_fresh_rank_can_be_killed_at_a_known_moment() -> None:
    with fresh_ranks(_tells_and_waits, 2) as ranks:
        assert ranks.receive(1) == {"rank": 1}
        os.kill(ranks.pid(1), signal.SIGKILL)
        ends = ranks.finish(may_fail=[1])
    assert [end.kind for end in ends] == ["returned", "died"]
    assert [end.exit_code for end in ends] == [0, -signal.SIGKILL]


def _exits(code: int) -> None:
    raise SystemExit(code)


def test_exit_codes_of_fresh_ranks_are_seen() -> None:
    with fresh_ranks(_exits, 2, 3) as ranks:
        ends = ranks.finish(may_fail=[0, 1])
    assert [end.exit_code for end in ends] == [3, 3]


def test_a_stopped_fresh_rank_is_reported_as_stopped() -> None:
    with fresh_ranks(_tells_and_waits, 2) as ranks:
        ranks.receive(0)
        ranks.receive(1)
        os.kill(ranks.pid(1), signal.SIGSTOP)
        with pytest.raises(RankFailedError, match="the process is stopped"):
            ranks.finish(timeout_s=1.0)
