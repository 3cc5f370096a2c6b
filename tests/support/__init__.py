"""Run test functions on real ranks: one process per rank, a fresh process group per test.

- `run_distributed`: decorator that makes a plain pytest function a function of N ranks.
- `run_ranks`: call a function on N ranks and get each rank's result, in rank order.
- `fresh_ranks`: processes of one's own, for tests that kill, stop or signal ranks.
- `tell_parent`: from a rank of `fresh_ranks`, a message to the test that started it.

What belongs to the tests' machinery only; it must not import distckpt.
"""

from tests.support.channel import tell_parent
from tests.support.fresh import FreshRanks, fresh_ranks
from tests.support.report import RankEnd, RankFailedError
from tests.support.run import run_distributed, run_ranks

__all__ = [
    "FreshRanks",
    "RankEnd",
    "RankFailedError",
    "fresh_ranks",
    "run_distributed",
    "run_ranks",
    "tell_parent",
]
