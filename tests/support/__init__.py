"""Run test functions on real ranks: one process per rank, a fresh process group per test.

- `run_distributed`: decorator that runs a plain pytest function on N ranks.
- `run_ranks`: call a function on N ranks and return each rank's result, in rank order.
- `fresh_ranks`: start processes for one test only, which may kill, stop or signal them.
- `send_to_parent`: from a rank of `fresh_ranks`, send a message to the test that started it.

docs/harness.md describes the harness. It must not import distckpt.
"""

from tests.support.channel import send_to_parent
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
    "send_to_parent",
]
